"""Convert the key names of a checkpoint to mmpretrain's or the authors'.

The configs load all of these formats directly. Convert a file for other programs, to strip it to its weights, or, with
--trust-checkpoint, if loading it requires running code.
"""

import argparse

from replk_mm import cli
from replk_mm.checkpoints.io import local_files, read_checkpoint, save_checkpoint
from replk_mm.checkpoints.key_formats import FORMATS, find_weights, to_official
from replk_mm.errors import UserError, command, command_line, format_list
from replk_mm.files import GENERATOR, check_outputs


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
    p.add_argument('--prefix', help="end of the prefix of the backbone's keys (default: detected)")
    p.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=True, help='prefer averaged weights')
    cli.add_overwrite(p)
    args = p.parse_args()
    check_outputs([args.out], inputs=local_files(args.checkpoint), overwrite=args.overwrite)
    loaded = read_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
    found = find_weights(loaded, None, args.checkpoint, args.prefix, args.use_ema)
    if not found.family and not args.trust_checkpoint:
        raise UserError(
            f'{args.checkpoint}: no known backbone; its keys begin with {format_list(found.backbone, 3)}\n'
            f'Key names are known of: {format_list(dict.fromkeys(f"{f.family} ({f.name})" for f in FORMATS), 9)}.'
        )
    backbone = to_official(found.backbone) if args.to == 'official' else found.backbone
    whole = 'backbone' in found.prefix.split('.')
    weights = {**{('backbone.' if whole else '') + key: value for key, value in backbone.items()}, **found.rest}
    # Keep how the weights were merged, and the classes.
    stored = loaded.get('meta') or {}
    meta = {key: stored[key] for key in ('replk_mm', 'dataset_meta', 'iter', 'seed') if key in stored}
    meta = {**GENERATOR, **meta, 'source': args.checkpoint, 'source_format': found.format}
    save_checkpoint({'meta': meta, 'state_dict': weights}, args.out)
    print(f'{args.checkpoint}: {found.describe()}')
    print(f'written: {args.out}, {len(backbone)} backbone weights, {len(found.rest)} others, {args.to} key names')
    use = ('test', 'CONFIG', args.out) if whole else ('train', 'CONFIG', '--pretrained', args.out)
    print(f'next: {command_line(*use)}')
