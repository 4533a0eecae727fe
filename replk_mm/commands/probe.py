"""Train a linear classifier on the frozen features of a backbone (docs/protocols.md)."""

from pathlib import Path

from replk_mm import cli
from replk_mm.engine.config import load_config
from replk_mm.engine.probe import ProbeSettings, prepare_probe, probe
from replk_mm.engine.process import select_device
from replk_mm.errors import command, command_line


@command
def main() -> None:
    p = cli.parser(
        __doc__, 'probe configs/upernet_replk-nano_ade20k.py --data-root data/mine --backbone efficientnet-lite0.in1k'
    )
    p.add_argument('config', help='config of a segmentor; a linear layer replaces its heads')
    cli.add_run_arguments(p, distributed=False)
    cli.add_training(p)
    cli.add_overwrite(p)
    p.add_argument('--features', choices=['last', 'all'], default='all', help='feature maps to use (default: all)')
    p.add_argument('--learning-rates', nargs='+', type=float, metavar='LR', help='to try (default: 0.001 to 0.03)')
    p.add_argument('--epochs', type=cli.positive_int, metavar='N', help='default: 50')
    p.add_argument('--seed', type=cli.seed, metavar='N', help='random seed (default: 0)')
    p.add_argument('--cache', type=Path, metavar='DIR', help='folder for features (default: work_dirs/features)')
    p.add_argument('--no-cache', action='store_true', help='compute the features in every epoch')
    p.add_argument('--max-cache', type=float, metavar='GIB', help='limit of the cache (default: 20)')
    p.add_argument('--clear-cache', action='store_true', help='first remove all features from the cache')
    args = p.parse_args()
    cfg = load_config(args.config, args.cfg_options, ('model', 'train_dataloader', 'test_dataloader'))
    notes = prepare_probe(cfg, cli.run_options(args), args.features)
    given = {name: value for name, value in vars(args).items() if name in vars(ProbeSettings()) and value is not None}
    settings = ProbeSettings(**{**given, **(dict(cache=None) if args.no_cache else {})})
    result = probe(cfg, notes, settings, select_device(args.device))
    print(f'written: {result.checkpoint}')
    print(f'next: {command_line("test", result.config, result.checkpoint, "--out", Path(cfg.work_dir, "test"))}')
