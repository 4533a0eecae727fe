"""Measure how a trained segmentor or detector holds up: common corruptions, other test sizes, another data set.

Prints the metric by corruption and severity; writes robustness.json, with intervals and protocol, and robustness.png.
docs/robustness.md defines the figures.
"""

from pydantic import ValidationError

from replk_mm import cli
from replk_mm.analysis.corruptions import RobustnessSettings
from replk_mm.analysis.robustness import measure_robustness
from replk_mm.engine.config import load_config
from replk_mm.errors import command
from replk_mm.text import text_table


@command
def main() -> None:
    p = cli.parser(__doc__, 'robustness configs/upernet_replk-nano_ade20k.py x.pth --data-root data/ade --out out')
    p.add_argument('config', help='config file, or PACKAGE::NAME.py (replk_mm::, mmseg::, ...)')
    p.add_argument('checkpoint', help='trained checkpoint, merged or not: file or URL')
    cli.add_run_arguments(p, distributed=False)
    cli.add_out(p, 'folder for robustness.json, robustness.png and logs')
    p.add_argument('--images', type=int, metavar='N', help='test images, a seeded choice (default: 50)')
    p.add_argument('--corruptions', nargs='*', metavar='NAME', help='such as fog (default: all)')
    p.add_argument('--severities', nargs='+', type=int, metavar='N', help='1 to 5 (default: all)')
    p.add_argument('--scales', nargs='*', type=float, metavar='F', help='factors of the test size (default: 0.5 to 2)')
    p.add_argument('--shifted-root', metavar='DIR', help='another data set with the same layout and classes')
    p.add_argument('--seed', type=int, metavar='N', help='of corruptions and choice of images (default: 0)')
    args = p.parse_args()
    given = {key: value for key, value in vars(args).items() if key in RobustnessSettings.model_fields}
    try:
        settings = RobustnessSettings(**{key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        p.error(f'argument --{first["loc"][0]}: {first["msg"].removeprefix("Value error, ")}')
    out = cli.prepare_out(args, 'robustness.json', 'robustness.png')
    args.work_dir = args.work_dir or str(out / 'logs')
    cfg = load_config(args.config, args.cfg_options)
    values = measure_robustness(cfg, args.checkpoint, cli.run_options(args), settings, out)['values']
    rows = [('', *(f'severity {severity}' for severity in settings.severities))]
    rows += [(name, *(_text(one) for one in of.values())) for name, of in values['corruptions'].items()]
    print(text_table(rows))
    for name in ('clean', 'mean_under_corruption', 'relative', 'shifted'):
        if name in values:
            print(f'{name.replace("_", " ")}: {_text(values[name], True)}{" % of clean" * (name == "relative")}')
    print('\n'.join(f'size x {size}: {_text(one, True)}' for size, one in values['sizes'].items()))
    print(f'{values["metric"]} of {values["images"]} images, in percent [95 % interval over images, not trainings]')
    print(f'written: {out / "robustness.json"}, {out / "robustness.png"}')


def _text(one: dict, interval: bool = False) -> str:
    low, value, high = ('none' if one[key] is None else f'{one[key]:.2f}' for key in ('low', 'value', 'high'))
    return f'{value} [{low}, {high}]' if interval else value
