"""Train the model of a config on a CPU, on a GPU, or with many processes under torchrun or Slurm."""

import time
from pathlib import Path

from mmengine.dist import get_rank

from replk_mm import cli
from replk_mm.engine.config import load_config
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import command
from replk_mm.text import format_duration


@command
def main() -> None:
    p = cli.parser(__doc__, 'train configs/upernet_replk-nano_demo.py --data-root demo/data')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    cli.add_run_arguments(p)
    p.add_argument(
        '--max-iters', type=cli.positive_int, metavar='N', help='train N iterations, with the schedule in proportion'
    )
    former = p.add_mutually_exclusive_group()
    former.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='continue from a checkpoint (default: the last one of the work dir)',
    )
    former.add_argument('--overwrite', action='store_true', help='replace the run in the work dir')
    cli.add_training(p)
    p.add_argument(
        '--freeze-backbone', action='store_true', help='train the heads only, on the features of a fixed backbone'
    )
    p.add_argument('--amp', choices=['bf16', 'fp16'], help='mixed precision (CPUs: bf16)')
    p.add_argument('--seed', type=cli.seed, metavar='N', help='random seed (default: drawn and recorded)')
    p.add_argument(
        '--no-preflight',
        dest='preflight',
        action='store_false',
        help='skip the dry run of loss, validation and checkpoint',
    )
    args = p.parse_args()
    frozen = dict(freeze_backbone=True) if args.freeze_backbone else {}
    cfg = load_config(args.config, {**(args.cfg_options or {}), **frozen})
    notes = prepare_training(cfg, cli.run_options(args))
    start = time.monotonic()
    last = train(cfg, notes, args.preflight, args.overwrite)
    if get_rank() == 0:
        print(f'trained in {format_duration(time.monotonic() - start)}: {last}')
        if last.is_file():
            print(f'next: {cli.follow_up("test", args, last, "--out", Path(cfg.work_dir, "test"))}')
