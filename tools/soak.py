"""Train, kill, resume and test again and again for a given time, and see that nothing is lost.

A training is interrupted at random moments by SIGKILL, SIGTERM and SIGINT, and its folder harmed now and then as crashes and
disks harm one, until it has reached its end; then its weights, optimizer and metrics must be, bit by bit, those of the same
training without interruption. Exit status 1 if anything was lost.
"""
import os
import sys
import time
from pathlib import Path

from replk_mm import cli
from replk_mm.bench.soak import Soaker
from replk_mm.data.demo_writer import write_demo_data
from replk_mm.data.scene_kinds import SCENES
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.errors import command

#: Without a config: a small network on scenes that are generated, a few seconds from its start to its end.
CONFIG = 'replk_mm::fcn_replk-nano_context.py'


@command
def main() -> int:
    p = cli.parser(__doc__, 'python tools/soak.py --minutes 2')
    p.add_argument('config', nargs='?', help='config to train (default: a small network on generated scenes)')
    p.add_argument('--minutes', type=float, default=2., help='how long (default: 2)')
    p.add_argument('--iterations', type=cli.positive, default=24, help='of the training (default: 24)')
    p.add_argument('--interval', type=cli.positive, default=4, help='iterations between checkpoints (default: 4)')
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set of the config')
    p.add_argument('--work-dir', type=Path, default=Path('work_dirs/soak'), help='for all runs (default: work_dirs/soak)')
    p.add_argument('--seed', type=int, default=None, help='of the interruptions (default: drawn and said)')
    args = p.parse_args()
    folder = prepare_work_dir(args.work_dir / time.strftime(f'%Y%m%d_%H%M%S_{os.getpid()}'))
    seed = int(time.time()) if args.seed is None else args.seed
    print(f'{folder}, seed {seed}', flush=True)
    data, settings = args.data_root, ['default_hooks.checkpoint.by_epoch=False',
                                      f'default_hooks.checkpoint.interval={args.interval}',
                                      'default_hooks.checkpoint.max_keep_ckpts=3']
    if args.config is None:
        data = folder / 'data'
        write_demo_data(data, train=16, val=4, size=(96, 96), kind=SCENES['context'])
        settings.append('train_dataloader.batch_size=4')
    arguments = [args.config or CONFIG, *(['--data-root', str(data)] if data else []), '--max-iters', str(args.iterations),
                 '--device', 'cpu', '--cfg-options', *settings]
    begun = time.monotonic()
    done = Soaker(arguments, folder, seed, lambda line: print(f'{time.monotonic() - begun:6.0f} s  {line}', flush=True)
                  ).run(args.minutes * 60)
    print(', '.join(f'{count} x {what}' for what, count in sorted(done.counts.items())))
    print('\n'.join(['LOST:', *done.losses]) if done.losses else 'nothing was lost')
    return 1 if done.losses else 0


if __name__ == '__main__':
    cli.start_process()
    sys.exit(main())
