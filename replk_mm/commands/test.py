"""Evaluate a checkpoint with the data set and metrics of a config."""

from pathlib import Path

from mmengine.dist import get_rank

from replk_mm import cli
from replk_mm.data.datasets import task_of
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.record import evaluation_record, write_record, write_statistics
from replk_mm.errors import command
from replk_mm.text import class_table, format_duration, format_metrics


@command
def main() -> None:
    p = cli.parser(__doc__, 'test configs/upernet_replk-nano_ade20k.py work_dirs/x/iter_1300.pth --out out')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument('checkpoint', help='trained checkpoint, merged or not: file or URL')
    cli.add_run_arguments(p)
    p.add_argument('--reparam', action='store_true', help='merge parallel kernels and fold BatchNorm first')
    p.add_argument('--tta', action='store_true', help="use the config's test-time augmentation (scales and flips)")
    cli.add_out(p, 'write metrics.json, counts per image and the predictions to this folder', required=False)
    args = p.parse_args()
    out = Path(args.out) if args.out else None
    if out:
        former = [out / 'predictions', *(out / 'predictions').rglob('*')]
        former = [path.relative_to(out) for path in former if path.is_symlink() or path.is_file()]
        cli.prepare_out(args, 'metrics.json', *(path.name for path in out.glob('statistics*.npz')), *former)
    cfg = load_config(args.config, args.cfg_options)
    result = evaluate(
        cfg,
        args.checkpoint,
        cli.run_options(args),
        reparam=args.reparam,
        tta=args.tta,
        predictions=out / 'predictions' if out else None,
    )
    if get_rank() != 0:
        return
    is_classifier = task_of(cfg) == 'classification'
    if result.per_class:
        print(class_table(result.per_class, result.absent))
    elif result.metrics:
        print('no table of classes: only replk_mm.IoUMetric, CocoMetric and Accuracy report single classes')
    if result.changes:
        print(f'reparameterized: {result.changes}')
    scores = format_metrics(result.metrics, result.absent)
    print(f'{result.images} images in {format_duration(result.seconds)}: {scores}')
    if out:
        statistics = write_statistics(result, out)
        write_record(evaluation_record(cfg, args.checkpoint, result, args.tta, statistics), out / 'metrics.json')
        names = ['metrics.json', *(one['file'] for one in statistics.values())]
        predictions = '' if is_classifier else f', and predictions in {out / "predictions"}'
        print(f'written: {", ".join(str(out / name) for name in names)}{predictions}')
    if is_classifier:  # there is nothing to draw
        return
    pictures = Path(out or cfg.work_dir, 'pictures')
    print(f'next: {cli.follow_up("predict", args, args.checkpoint, result.image or "IMAGE", "--out", pictures)}')
