"""Export a trained checkpoint to ONNX, OpenVINO or torch.export, and compare its outputs with those of torch.

Parallel kernels are merged and BatchNorm is folded first. OUT becomes a folder with the network and manifest.json. The
commands test and predict take it in place of a checkpoint, benchmark --compare and choose --artefacts beside others.
"""

import copy

from replk_mm import cli
from replk_mm.deploy.artefact import FORMATS, PRECISIONS, TRUST
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.export import ExportOptions, export_checkpoint
from replk_mm.engine.inference import adopt_classes
from replk_mm.errors import command
from replk_mm.text import format_metrics


@command
def main() -> None:
    p = cli.parser(
        __doc__,
        'export configs/upernet_replk-nano_ade20k.py iter_1300.pth exported --data-root data/ade',
        'export configs/upernet_replk-nano_ade20k.py iter_1300.pth exported-int8 --precision int8 --data-root data/ade',
    )
    p.add_argument('config', help='config the checkpoint was trained with')
    p.add_argument('checkpoint', help='trained checkpoint, merged or not')
    p.add_argument('out', help='folder for the network and manifest.json')
    p.add_argument('--format', choices=FORMATS, default='onnx', help='default: onnx')
    p.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='fp32',
        help='fp16 stores weights in float16; bf16 and int8 also compute in them (default: fp32)',
    )
    size = p.add_mutually_exclusive_group()
    size.add_argument(
        '--shape',
        type=cli.positive_int,
        nargs=2,
        metavar=('H', 'W'),
        help='fixed height and width of the input in pixels (default: that of the windows or images of the config, or '
        '--dynamic if they differ in size)',
    )
    size.add_argument('--dynamic', action='store_true', default=None, help='any number of images of any size')
    p.add_argument('--batch', type=cli.positive_int, default=1, metavar='N', help='fixed number of images (default: 1)')
    p.add_argument('--labels', action='store_true', help='segmentors: the network also returns the class of each pixel')
    p.add_argument('--data-root', metavar='DIR', help='folder of the data set (default: as in the config)')
    p.add_argument(
        '--images', type=cli.int_at_least(0), default=4, metavar='N', help='test images to compare (default: 4)'
    )
    p.add_argument(
        '--calibration',
        type=cli.positive_int,
        metavar='N',
        help='training images that set the ranges of int8 (default: 32)',
    )
    p.add_argument(
        '--tolerance',
        type=cli.share,
        metavar='SHARE',
        help='largest share of pixels or objects that may differ, 0 to 1; logits are then not limited (default: by '
        'precision, see docs/export.md)',
    )
    p.add_argument(
        '--no-score', dest='score', action='store_false', help='int8: do not compare the scores on the test set'
    )
    cli.add_overwrite(p)
    cli.add_config_options(p)
    args = p.parse_args()
    if args.precision != 'int8' and (args.calibration or not args.score):
        p.error(f'--calibration and --no-score are for --precision int8, not {args.precision}')
    if args.dynamic and args.batch != 1:
        p.error(f'--batch {args.batch}: --dynamic takes any number of images')
    args.calibration = args.calibration or ExportOptions.calibration
    cfg = load_config(args.config, args.cfg_options)
    options = ExportOptions(
        **{name: value for name, value in vars(args).items() if name in ExportOptions.__dataclass_fields__}
    )
    whole = copy.deepcopy(cfg)
    manifest = export_checkpoint(cfg, args.checkpoint, args.out, options, args.overwrite)
    shape = ' x '.join(str(n) for n in manifest.inputs[0].shape)
    print(f'written: {args.out}: {manifest.format}, {manifest.precision}, images {shape}')
    args.classes = ','.join(manifest.classes) if adopt_classes(copy.deepcopy(whole), args.checkpoint) else None
    if manifest.precision == 'int8' and args.score:
        for name, checkpoint in (('torch', args.checkpoint), ('int8', args.out)):
            result = evaluate(copy.deepcopy(whole), checkpoint, cli.run_options(args))
            print(f'{name}: {format_metrics(result.metrics, result.absent)}, {result.images} images')
    trust = f'{TRUST}=1 ' if manifest.format == 'torch' else ''
    print(f'next: {trust}{cli.follow_up("test", args, args.out)}')
