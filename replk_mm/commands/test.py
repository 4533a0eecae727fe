"""Evaluate a checkpoint: mIoU or mAP, as the config's data set and recipe say."""

from pathlib import Path

from mmengine.dist import get_rank

from replk_mm import cli
from replk_mm.engine import results
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.errors import command


@command
def main() -> None:
    p = cli.parser(__doc__, 'test configs/upernet_replk-nano_ade20k.py work_dirs/x/iter_1300.pth --out out')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument('checkpoint', help='trained checkpoint, merged or not: file or address')
    cli.add_run_arguments(p)
    p.add_argument('--reparam', action='store_true', help='merge parallel kernels and fold BatchNorm before evaluating')
    p.add_argument('--tta', action='store_true', help="the config's test-time augmentation (scales and flips)")
    p.add_argument('--out', metavar='DIR', help='write metrics.json and the predicted label maps (PNG) there')
    args = p.parse_args()
    out = Path(args.out) if args.out else None
    if out:
        prepare_work_dir(out, option='--out')
    cfg = load_config(args.config, args.cfg_options)
    result = evaluate(
        cfg,
        args.checkpoint,
        cli.options_of(args),
        reparam=args.reparam,
        tta=args.tta,
        predictions=out / 'predictions' if out else None,
    )
    if get_rank() != 0:
        return
    for note in result.notes:
        print(note)
    print(f'weights: {result.load}')
    if result.changes:
        print(f'reparameterized: {result.changes}')
    print(f'{result.images} images in {result.seconds:.1f} s')
    print(
        '  '.join(
            f'{name} {value:.4g}'
            for name, value in result.metrics.items()
            if isinstance(value, (int, float)) and name not in ('data_time', 'time')
        )
    )
    if out:
        results.write(results.record(cfg, args.checkpoint, result, args.tta), out / 'metrics.json')
        print(f'written: {out}')
