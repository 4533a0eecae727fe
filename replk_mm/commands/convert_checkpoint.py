"""Convert the key names of a RepLKNet or ConvNeXt checkpoint (from the authors' code, mmpretrain or timm).

The configs load all of these formats directly. Convert a file for other programs, to strip it to its weights, or, with
--trust-checkpoint, if loading it requires running code.
"""

from replk_mm import cli
from replk_mm.checkpoints.io import read_checkpoint, require_different_files, save_checkpoint
from replk_mm.checkpoints.key_formats import convert_state_dict, to_official, unwrap_state_dict
from replk_mm.errors import UserError, command, command_line


@command
def main() -> None:
    p = cli.parser(__doc__, 'convert_checkpoint convnext_tiny_1k_224.pth convnext_tiny.pth')
    p.add_argument('checkpoint', help='file or URL')
    p.add_argument('out', help='file to write; .safetensors for a format that other programs read')
    p.add_argument(
        '--to',
        choices=['mmpretrain', 'official'],
        default='mmpretrain',
        help="key names to write: mmpretrain's (ours), or those of the authors' code (default: mmpretrain)",
    )
    p.add_argument(
        '--trust-checkpoint', action='store_true', help='let the checkpoint run code; use only if you trust its author'
    )
    args = p.parse_args()
    require_different_files(args.checkpoint, args.out)
    loaded = read_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    found = convert_state_dict(unwrap_state_dict(loaded, args.checkpoint))
    if not found.family and not args.trust_checkpoint:
        raise UserError(
            f'{args.checkpoint}: neither RepLKNet nor ConvNeXt; its keys begin with '
            f'{", ".join(list(found.backbone)[:3])}\nOnly these two families have other key names.'
        )
    backbone = to_official(found.backbone) if args.to == 'official' else found.backbone
    prefix = 'backbone.' if found.whole_model else ''
    weights = {**{prefix + key: value for key, value in backbone.items()}, **found.rest}
    # Keep how the weights were merged, and the classes.
    stored = loaded.get('meta')
    stored = stored if isinstance(stored, dict) else {}
    meta = {key: stored[key] for key in ('replk_mm', 'dataset_meta', 'iter', 'seed') if key in stored}
    meta |= {'source': args.checkpoint, 'source_format': found.format}
    save_checkpoint({'meta': meta, 'state_dict': weights}, args.out)
    print(f'{args.checkpoint}: {found.describe()}')
    print(f'written: {args.out}, {len(backbone)} backbone weights, {len(found.rest)} others, {args.to} key names')
    use = ('test', 'CONFIG', args.out) if found.whole_model else ('train', 'CONFIG', '--pretrained', args.out)
    print(f'next: {command_line(*use)}')
