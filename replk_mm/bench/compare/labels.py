"""The labels and the exported predictions of a segmentation test, read as the test read them."""
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image

from replk_mm.bench.compare.results import Result, Source, config_of
from replk_mm.data.checks.audit import check_data
from replk_mm.data.datasets import as_list, dataset_class, datasets_of
from replk_mm.data.files import IGNORED, UNDECODABLE
from replk_mm.errors import UserError


@dataclass
class Labels:
    """The labelled images of a config's test data, read as a test reads them.

    Attributes:
        names: Of the images: their paths below the image folder without suffix, as predictions are named.
        entries: What the data set knows of each, and its loading step.
        classes: Names.
        palette: RGB of each class.
        ignore_index: The label that is not scored.
        first: Id of the first class in exported label maps.
    """

    names: list[str]
    entries: list[tuple[dict, Callable[[dict], dict]]]
    classes: list[str]
    palette: list[list[int]]
    ignore_index: int
    first: int

    def read(self, index: int) -> np.ndarray:
        """Class indices ``(H, W)`` of an image.

        Raises:
            UserError: If the file cannot be read.
        """
        info, load = self.entries[index]
        try:
            return np.asarray(load({**info, 'seg_fields': []})['gt_seg_map'])
        except (*UNDECODABLE, AttributeError) as error:
            raise UserError(f'{info["seg_map_path"]}: the labels cannot be read ({error})\nReplace the file.') from error

    def prediction(self, index: int, result: Result) -> np.ndarray:
        """Class indices ``(H, W)`` that a result predicts, beyond the classes where none is.

        Raises:
            UserError: If the file cannot be read.
        """
        path = result.predictions / f'{self.names[index]}.png'
        try:
            found = np.asarray(Image.open(path))
        except UNDECODABLE as error:
            raise UserError(f'{path}: cannot be read ({error})\nTest again with --out {result.file.parent}.') from error
        return found - np.uint8(self.first)


def open_labels(result: Result, source: Source, root: str | None) -> Labels:
    """The labels that a result was tested against.

    Raises:
        UserError: If data or predictions are missing.
    """
    cfg = config_of(result, source, root)
    check_data(cfg, ('test',))
    scope = cfg.get('default_scope', 'mmengine')
    found: list[tuple[dict, Callable[[dict], dict]]] = []
    datasets = []
    for part in datasets_of(cfg, ('test',)):
        if not hasattr(dataset_class(part, scope), 'get_label_map'):
            raise UserError(f'{cfg.filename}: {part["type"]} is no data set of label maps, and {result.file} has figures of '
                            f'one\nName the config of the test with --config FILE.')
        with DATASETS.switch_scope_and_registry(scope) as registry:
            built = registry.build({**part, 'pipeline': [_loading_step(cfg, part)], 'test_mode': True})
        datasets.append(built)
        found += [(built.get_data_info(i), built.pipeline) for i in range(len(built))]
    names = _exported_names([info['img_path'] for info, _ in found], cfg)
    meta = datasets[0].metainfo
    metric: dict = next((m for m in as_list(cfg.get('test_evaluator')) if str(m.get('type')).endswith('IoUMetric')), {})
    labels = Labels(names, found, list(meta['classes']), [list(c) for c in meta['palette']],
                    metric.get('ignore_index', IGNORED), 1 if meta['reduce_zero_label'] else 0)
    _check_files(result, labels)
    return labels


def _exported_names(images: list[str], cfg: Config) -> list[str]:
    # As `export_predictions` and `IoUMetric` have it; an image may be a link to somewhere else.
    roots = [Path(part.get('data_root') or '', (part.get('data_prefix') or {}).get('img_path') or '').resolve()
             for part in datasets_of(cfg, ('test',))]
    root = Path(os.path.commonpath(roots))
    folders = [Path(image).resolve().parent for image in images]
    return [str(Path(folder.relative_to(root) if folder.is_relative_to(root) else '', Path(image).stem))
            for image, folder in zip(images, folders, strict=True)]


def _loading_step(cfg: Config, dataset: dict) -> dict:
    def steps(node) -> Iterator[dict]:
        for part in node if isinstance(node, (list, tuple)) else [node]:
            if isinstance(part, dict):
                yield part
                yield from steps(part.get('transforms', []))
            else:
                yield from steps(part)

    known = [step for step in steps([dataset.get('pipeline', []), cfg.get('tta_pipeline', [])])
             if str(step.get('type')).endswith('LoadAnnotations')]
    return known[0] if known else dict(type='LoadAnnotations')


def _check_files(result: Result, labels: Labels) -> None:
    folder = result.predictions
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder, so that images of {result.letter} cannot be compared\n'
                        f'tools/test.py --out {result.file.parent} writes it; --no-images compares the figures alone.')
    there = {str(path.relative_to(folder).with_suffix('')) for path in folder.rglob('*.png')}
    missing = [name for name in labels.names if name not in there]
    if missing:
        raise UserError(f'{folder / missing[0]}.png: no such file; {result.letter} lacks predictions of {len(missing)} of the '
                        f'{len(labels.names)} images in the data\nTest it on the same images again, with --out '
                        f'{result.file.parent}.')
    strange = sorted(there - set(labels.names))
    if strange:
        raise UserError(f'{folder / strange[0]}.png: there is no such image in the data; {len(strange)} of the {len(there)} '
                        f'predictions of {result.letter} are of other images\nName the data of the test with --data-root DIR.')


def check_same(a: Labels, b: Labels, files: str) -> None:
    """Refuse two tests that read labels in different ways.

    Raises:
        UserError: If classes, images or the meaning of ids differ.
    """
    def way(labels: Labels) -> dict:
        info = labels.entries[0][0]
        return {'classes': labels.classes, 'images': labels.names, 'ignore_index': labels.ignore_index,
                'reduce_zero_label': bool(info['reduce_zero_label']), 'label_map': info['label_map']}

    differing = [key for key, value in way(a).items() if value != way(b)[key]]
    if differing:
        key = differing[0]
        shown = '; '.join(f'{letter}: {str(way(labels)[key])[:200]}' for letter, labels in (('A', a), ('B', b)))
        raise UserError(f'{files}: the configs read the labels in different ways: {", ".join(differing)} differ ({shown})\n'
                        f'Test both checkpoints on the same data with the same classes.')
