"""Predict images with a trained segmentor or detector; draw and write label maps, or boxes and masks."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm import cli
from replk_mm.engine import predict as prediction
from replk_mm.engine.config import load_config
from replk_mm.errors import command
from replk_mm.files import write_output
from replk_mm.visualize import class_legend, draw_instances, overlay


@command
def main() -> None:
    p = cli.parser(__doc__, 'predict configs/upernet_replk-nano_ade20k.py iter_1300.pth street.jpg --out out')
    p.add_argument('config', help='config the checkpoint was trained with')
    p.add_argument('checkpoint', help='trained checkpoint, merged or not')
    p.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    cli.add_out(p, 'folder for NAME_overlay.png with NAME_labels.png (class indices from 0) or NAME_objects.json')
    p.add_argument(
        '--score',
        type=cli.share,
        default=0.3,
        metavar='S',
        help='minimum score of detected objects, 0 to 1 (default: 0.3)',
    )
    p.add_argument('--device', metavar='D', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    p.add_argument('--reparam', action='store_true', help='merge parallel kernels and fold BatchNorm first')
    cli.add_config_options(p)
    cli.add_resize_kernels(p)
    args = p.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    model: Any = prediction.load_for_prediction(cfg, args.checkpoint, args.device, args.reparam)
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    stems: dict[str, None] = {}
    for path in map(Path, args.images):
        # Images of one name from different folders must not overwrite each other.
        names = itertools.chain([path.stem], (f'{path.stem}_{n}' for n in itertools.count(2)))
        stems[next(name for name in names if name not in stems)] = None
    kind = 'labels.png' if prediction.is_segmentor(model) else 'objects.json'
    outputs = (f'{stem}_{name}' for stem in stems for name in ('overlay.png', kind))
    out = cli.prepare_out(args, *outputs, inputs=args.images)
    predictions = prediction.predict(model, args.images)
    for i, (stem, (_, image, found)) in enumerate(zip(stems, predictions, strict=True), 1):
        if prediction.is_segmentor(model):
            labels = prediction.label_map(found)
            picture = np.hstack(
                [overlay(image, labels, palette), class_legend(labels, classes, palette, image.shape[0])]
            )
            prediction.write_picture(out / f'{stem}_labels.png', labels)
            summary = ''
        else:
            objects = prediction.select_instances(found, args.score)
            picture = draw_instances(image, objects, classes, palette)
            summary = f': {prediction.describe_instances(found, objects, classes)}'
            described = json.dumps(prediction.instances_to_json(objects, classes), indent=2)
            write_output(out / f'{stem}_objects.json', described + '\n')
        prediction.write_picture(out / f'{stem}_overlay.png', picture)
        print(f'{i}/{len(args.images)} {out / stem}_overlay.png{summary}', flush=True)
