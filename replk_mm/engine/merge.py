"""Merge a trained checkpoint, with proof."""

from pathlib import Path

from mmengine.config import Config

from replk_mm import checkpoints
from replk_mm.equivalence import compare
from replk_mm.errors import UserError
from replk_mm.files import sha256
from replk_mm.loading import build_for_inference
from replk_mm.reparam import Changes, reparameterize


def reparameterize_checkpoint(
    cfg: Config, checkpoint: str, out: str | Path, shape: tuple[int, int] = (64, 64)
) -> tuple[Changes, list]:
    """Merge and fold a trained checkpoint, prove that it computes the same, and write it.

    Args:
        cfg: The config it was trained with.
        checkpoint: Path or address, in training form (or merged already: then it is written again as it is).
        out: File to write. Nothing is written if the proof fails.
        shape: Height and width of the random image of the proof, in pixels.

    Returns:
        What was changed, and the differences found.

    Raises:
        UserError: If the checkpoint does not fit, the outputs differ beyond the tolerance, or ``out`` cannot be
            written.
    """
    checkpoints.keep_apart(checkpoint, out)
    built = build_for_inference(cfg, checkpoint, packed=False)
    model, meta = built.model, built.meta
    merged, changes = reparameterize(model)
    differences = compare(model, merged, (1, 3, *shape))
    if not all(d.ok for d in differences):
        raise UserError(
            f'{checkpoint}: the merged network computes something else, nothing was written\n'
            + '\n'.join(map(str, differences))
        )
    former = checkpoints.reparameterization_of({'meta': meta}, merged.state_dict()) or {}
    record = dict(
        merge=bool(changes.merged) or former.get('merge', True),
        fold=True,
        source=str(checkpoint),
        source_sha256=sha256(checkpoints.fetch(checkpoint)),
        differences=[dict(dtype=str(d.dtype), absolute=d.absolute, relative=d.relative) for d in differences],
    )
    plain = {key: value for key, value in meta.items() if isinstance(value, (str, int, float, bool, dict, list, tuple))}
    meta = {**plain, 'replk_mm': {'reparameterized': record}}
    checkpoints.save({'meta': meta, 'state_dict': merged.state_dict()}, out)
    return changes, differences
