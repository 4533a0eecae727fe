"""Public import path of :mod:`replk_mm.deploy.reparameterize`."""

from replk_mm.deploy.reparameterize import Changes, reparameterize

__all__ = ['Changes', 'reparameterize']
