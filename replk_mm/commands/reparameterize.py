"""Merge parallel kernels and fold BatchNorm of a trained checkpoint, and check that the outputs stay the same."""

from pathlib import Path

from replk_mm import cli
from replk_mm.engine.config import load_config
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.errors import command


@command
def main() -> None:
    p = cli.parser(__doc__, 'reparameterize configs/upernet_replk-nano_ade20k.py iter_1300.pth merged.pth')
    p.add_argument('config', help='config the checkpoint was trained with')
    p.add_argument('checkpoint', help='trained checkpoint')
    p.add_argument('out', help='file to write; the test command loads it with the same config')
    p.add_argument(
        '--shape',
        type=cli.positive_int,
        nargs=2,
        default=(64, 64),
        metavar=('H', 'W'),
        help='size of the random test image in pixels (default: 64 64)',
    )
    cli.add_overwrite(p)
    cli.add_config_options(p)
    args = p.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    changes, differences = reparameterize_checkpoint(cfg, args.checkpoint, args.out, tuple(args.shape), args.overwrite)
    print(changes if changes.merged or changes.folded else f'already merged, or without BatchNorm: {changes}')
    for difference in differences:
        print(difference)
    print(f'written: {args.out}')
    saved = Path(args.checkpoint).with_name(Path(str(cfg.filename)).name)
    if saved.is_file():  # with the data and the classes of the training
        args.config = saved
    print(f'next: {cli.follow_up("test", args, args.out)}')
