"""Measure whether a trained segmentation network decides by shape or by texture (docs/erf.md)."""

from pathlib import Path

from replk_mm import cli
from replk_mm.analysis.shape_bias import measure_shape_bias
from replk_mm.engine.config import load_config
from replk_mm.errors import command
from replk_mm.text import text_table


@command
def main() -> None:
    p = cli.parser(
        __doc__, 'shape_bias configs/upernet_replk-nano_demo.py iter_600.pth --data-root data/conflict --out out'
    )
    p.add_argument('config', help='config the checkpoint was trained with')
    p.add_argument('checkpoint', help='checkpoint trained on objects with both cues: file or URL')
    p.add_argument(
        '--data-root',
        required=True,
        type=Path,
        metavar='DIR',
        help='data set that make_demo_data wrote with --scenes conflict',
    )
    cli.add_out(p, 'folder for shape_bias.json and shape_bias.png')
    p.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    cli.add_config_options(p)
    args = p.parse_args()
    out = cli.prepare_out(args, 'shape_bias.json', 'shape_bias.png')
    cfg = load_config(args.config, args.cfg_options)
    bias = measure_shape_bias(cfg, args.checkpoint, args.data_root, out, args.device)
    values = bias.values()
    rows = [('shape of', 'by shape', 'by texture', 'other', 'shape bias')]
    for name, row in (*values['per_class'].items(), ('all', values)):
        share = '-' if row['shape_bias'] is None else f'{row["shape_bias"]:.3f}'
        rows.append((name, *(str(row[key]) for key in ('shape_decisions', 'texture_decisions', 'other')), share))
    print(f'{text_table(rows)}\nshape bias: by shape / (by shape + by texture). The decision about an object is the')
    print('object class that most of its pixels are predicted as; a third class, a tie or no such pixel is other.')
    if bias.agreeing:
        print(
            f'where shape and texture agree, {100 * values["agreeing_accuracy"]:.1f} % of '
            f'{values["agreeing_objects"]} objects are decided correctly; shape bias is meaningful only if most are'
        )
    print(f'written: {out / "shape_bias.json"}, {out / "shape_bias.png"}')
