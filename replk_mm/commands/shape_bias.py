"""Measure whether a trained network decides by shape or by texture (docs/erf.md).

The network is a segmentor, on generated scenes, or an ImageNet classifier, on the published images with a cue conflict.
"""

from pathlib import Path

from replk_mm import cli
from replk_mm.analysis.shape_bias import measure_shape_bias, summary
from replk_mm.analysis.shape_bias_images import load_mmpretrain, load_timm, measure_classifier
from replk_mm.data.scenes.layouts import LISTING
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError, command
from replk_mm.text import text_table


@command
def main() -> None:
    p = cli.parser(
        __doc__,
        'shape_bias configs/upernet_replk-nano_demo.py iter_600.pth --data-root data/conflict --out out',
        'shape_bias timm/resnet50.a1_in1k --data-root texture-vs-shape/stimuli/style-transfer --out out',
    )
    p.add_argument(
        'config',
        help='config that the checkpoint was trained with; or a classifier: timm/NAME, or a config of mmpretrain',
    )
    p.add_argument(
        'checkpoint',
        nargs='?',
        help='file or URL: a segmentor trained on objects with both cues, or a whole classifier of ImageNet-1K '
        '(default: the weights of timm/NAME)',
    )
    p.add_argument(
        '--data-root',
        required=True,
        type=Path,
        metavar='DIR',
        help='data set that make_demo_data wrote with --scenes conflict; or the published images, such as '
        'cat/cat1-dog2.png',
    )
    cli.add_out(p, 'folder for shape_bias.json and shape_bias.png')
    p.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    cli.add_config_options(p)
    args = p.parse_args()
    out = cli.prepare_out(args, 'shape_bias.json', 'shape_bias.png')
    is_config = args.config.endswith('.py')
    if is_config and not args.checkpoint:
        raise UserError(f'{args.config}: needs a checkpoint\nGive it as second argument.')
    if (args.data_root / LISTING).exists():
        bias = measure_shape_bias(
            load_config(args.config, args.cfg_options), args.checkpoint, args.data_root, out, args.device
        )
    else:
        classifier = (
            load_mmpretrain(load_config(args.config, args.cfg_options), args.checkpoint, args.device)
            if is_config
            else load_timm(args.config, args.checkpoint, args.device)
        )
        bias = measure_classifier(
            classifier, args.data_root, out, config=args.config, checkpoint=dict(path=args.checkpoint)
        )
    values = bias.values()
    keys = ('shape_decisions', 'texture_decisions', 'other')
    rows = [('shape of', 'by shape', 'by texture', 'other', 'by shape, %', 'by texture, %', 'shape bias')]
    for name, row in (*values['per_class'].items(), ('all', values)):
        shares = [100 * row[key] for key in ('shape_accuracy', 'texture_accuracy') if row[key] is not None]
        share = '-' if row['shape_bias'] is None else f'{row["shape_bias"]:.3f}'
        rows.append((name, *(str(row[key]) for key in keys), *(f'{x:.1f}' for x in shares), share))
    print(f'{text_table(rows)}\nshape bias: by shape / (by shape + by texture). It hides how often either cue is used:')
    print(f'read both shares beside it. {bias.data["definition"]}')
    print(summary(values))
    if values['mean_over_classes'] is not None:
        print(f'mean of the shape biases of the classes: {values["mean_over_classes"]:.3f}')
    print(f'written: {out / "shape_bias.json"}, {out / "shape_bias.png"}')
