"""Procedural data sets: one generator, several kinds of scenes (:data:`~replk_mm.data.scenes.kinds.SCENES`)."""
