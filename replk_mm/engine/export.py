"""Export a trained checkpoint: merge it, write the network, and compare its outputs with those of torch."""

import copy
import logging
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor

from replk_mm.checkpoints.io import MANIFEST, fetch_checkpoint, hash_checkpoint, local_files
from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import crop_of, dataset_class, datasets_of
from replk_mm.deploy.artefact import (
    NETWORK_FILES,
    Artefact,
    Comparison,
    Manifest,
    TensorInfo,
    fit_image,
    is_artefact,
    read_manifest,
)
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.export import check_format, smallest_size, trace, write_network
from replk_mm.deploy.exportable import exportable
from replk_mm.deploy.operators import OPSET
from replk_mm.deploy.parity import TOLERANCES, compare_classes, compare_labels, compare_objects
from replk_mm.deploy.reparameterize import Changes, reparameterize
from replk_mm.engine.artefact_model import (
    DetectorPrediction,
    count_classes,
    fingerprint,
    normalization_of,
    task_of_model,
    test_settings,
)
from replk_mm.engine.config import build_model
from replk_mm.engine.inference import build_for_inference
from replk_mm.engine.prepare import prepare_data
from replk_mm.engine.process import RunOptions, prepare_work_dir
from replk_mm.engine.record import environment_info
from replk_mm.errors import UserError
from replk_mm.files import GENERATOR, check_outputs, sha256, write_output
from replk_mm.logs import announce, log_notes
from replk_mm.wrappers import input_channels

#: What each input and output is, in the manifest.
_MEANING = {
    'image': 'images, normalized and padded',
    'size': 'height and width of each image without its padding, pixels',
    'logits': 'scores before the softmax; of segmentors at the stride of the head: interpolate (bilinear), then argmax',
    'labels': 'class of each pixel of the input, or of each object; -1 for objects that were not found',
    'boxes': 'left, top, right, bottom, pixels of the input',
    'scores': 'score of each object, highest first; 0 for objects that were not found',
    'masks': 'probability of the object within its box: resize to the box',
}
_DIMENSIONS = ('batch', 'channels', 'height', 'width')


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    format: str = 'onnx'  #: a name in :data:`replk_mm.deploy.artefact.FORMATS`
    precision: str = 'fp32'  #: a name in :data:`replk_mm.deploy.artefact.PRECISIONS`
    shape: tuple[int, int] | None = None  #: height and width in pixels; None for the config's
    dynamic: bool | None = None  #: any number of images of any size; None if the config's images differ in size
    batch: int = 1  #: number of images, if it is fixed
    labels: bool = False  #: segmentors also return label maps
    images: int = 4  #: number of test images to compare
    calibration: int = 32  #: number of training images that set the ranges of int8
    tolerance: float | None = None  #: largest share of pixels or objects that differ; None for that of the precision
    data_root: str | None = None  #: folder of the data set; None for the config's


def export_checkpoint(
    cfg: Config, checkpoint: str, out: str | Path, options: ExportOptions, overwrite: bool = False
) -> Manifest:
    """Export a trained checkpoint as a folder with a network and its manifest.

    Args:
        cfg: The config it was trained with; changed in place.
        checkpoint: Path or URL, merged or not.
        out: The folder. Nothing is left there if the outputs differ.
        options: How to export.
        overwrite: Whether to replace files at ``out`` that this function did not write. Defaults to False.

    Returns:
        The manifest.

    Raises:
        UserError: If the model cannot be exported as asked, a package is missing, the outputs differ from torch's
            beyond the tolerance, or ``out`` cannot be written.
    """
    check_format(options.format, options.precision)
    if options.precision == 'int8' and not options.images:
        raise UserError('--images 0: int8 is compared on test images only\nUse --images 4.')
    out = Path(out)
    former = _prepare_out(out, checkpoint, options, overwrite)
    built = build_for_inference(cfg, checkpoint, packed=False)
    if options.labels and task_of_model(built.model) != 'segmentation':
        raise UserError(f'--labels: {type(built.model).__name__} is no segmentor\nOmit --labels.')
    model, changes = _merge(built.model, checkpoint)
    data = _Data(cfg, model, options)
    module = exportable(copy.deepcopy(model), options.labels)
    example = _random_inputs(model, 2 if data.dynamic else options.batch, data.shape, module.inputs, seed=0)
    announce(
        f'tracing {len(example[0])} x {data.shape[0]} x {data.shape[1]} pixels{" for any size" if data.dynamic else ""}'
    )
    program = trace(module, example, data.dynamic)
    calibration = data.inputs('train', options.calibration) if options.precision == 'int8' else []
    if calibration:
        announce(f'calibrating with {len(calibration)} training images')
        calibration = [tuple(x.repeat(options.batch, *[1] * (x.dim() - 1)) for x in inputs) for inputs in calibration]
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix='.export-') as scratch:
        folder = Path(scratch)
        announce(f'writing {options.format}, {options.precision}')
        network = write_network(program, module, folder, options.format, options.precision, calibration)
        manifest = Manifest(
            generator=GENERATOR['generator'],
            format=options.format,
            precision=options.precision,
            network=network.name,
            files={path.name: sha256(path) for path in sorted(folder.iterdir())},
            opset=OPSET if options.format == 'onnx' else None,
            task=task_of_model(model),
            model=type(model).__name__,
            **_tensors(module, example, data.dynamic),
            smallest_size=smallest_size(program),
            normalization=normalization_of(model),
            **_classes(cfg, model, built.meta),
            config=str(cfg.filename),
            checkpoint=dict(name=Path(str(checkpoint)).name, sha256=hash_checkpoint(fetch_checkpoint(checkpoint))),
            iteration=built.meta.get('iter'),
            resize=data.resize,
            reparameterization=str(changes),
            comparisons=[],
            calibration_images=len(calibration) or None,
            postprocessing=test_settings(model),
            weights=fingerprint(build_model(cfg, 'meta')),
            environment=environment_info(),
        )
        write_output(folder / MANIFEST, manifest.model_dump_json(indent=2) + '\n')
        announce('comparing its outputs with those of torch')
        comparisons = _compare(model, Artefact(folder, trust=True), data, options)
        for comparison in comparisons:
            announce(f'  {comparison}')
        if not all(comparison.ok for comparison in comparisons):
            raise UserError(
                f'{checkpoint}: the exported network differs from torch; nothing was written\n'
                + '\n'.join(str(comparison) for comparison in comparisons if not comparison.ok)
                + '\nUse another --precision or --format, or accept more with --tolerance.'
            )
        manifest = manifest.model_copy(update=dict(comparisons=comparisons))
        write_output(folder / MANIFEST, manifest.model_dump_json(indent=2) + '\n')
        out.mkdir(exist_ok=True)
        for name in former:
            (out / name).unlink(missing_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest last
            shutil.move(path, out / path.name)
    return manifest


def _prepare_out(out: Path, checkpoint: str, options: ExportOptions, overwrite: bool) -> list[str]:
    """Check that the folder can be written, and return the files of the export that is there."""
    if out.exists() and not out.is_dir():
        raise UserError(f'{out}: is a file; the export writes a folder\nChoose another path.')
    prepare_work_dir(out.absolute().parent, option='OUT')
    former = sorted(read_manifest(out).files) if is_artefact(out) else []
    written = {NETWORK_FILES[options.format], *former, MANIFEST}
    check_outputs((out / name for name in sorted(written)), inputs=local_files(checkpoint), overwrite=overwrite)
    return former


def _merge(model: Any, checkpoint: str) -> tuple[Any, Changes]:
    """The reparameterized model, whose outputs must be those of the model."""
    merged, changes = reparameterize(model)
    differences = compare_networks(model, merged, (1, input_channels(merged), 64, 64))
    if not all(d.ok for d in differences):
        raise UserError(
            f'{checkpoint}: the outputs of the merged network differ; nothing was written\n'
            + '\n'.join(map(str, differences))
        )
    announce(f'{changes}; {"; ".join(map(str, differences))}')
    return merged, changes


class _Data:
    """Sizes of the network's inputs, and inputs made of the images of the data set.

    Args:
        cfg: Changed in place.
        model: The merged model.
        options: How to export.

    Raises:
        UserError: If an asked size does not fit, or int8 has no data to calibrate with.
    """

    def __init__(self, cfg: Config, model: Any, options: ExportOptions) -> None:
        self.cfg, self.model = cfg, model
        self.scope = cfg.get('default_scope', 'mmengine')
        self.windows = self._windows()
        self.resize = self._resize()
        self.dynamic, self.shape = self._size(options)
        self.splits: dict[str, Any] = {}
        wanted = ('test', 'train') if options.precision == 'int8' else ('test',)
        try:
            log_notes(prepare_data(cfg, RunOptions(data_root=options.data_root), wanted))
        except UserError as error:
            if options.precision == 'int8' or options.data_root:
                raise
            announce(f'no test images to compare: {str(error).splitlines()[0]}\n  --data-root names their folder')
            return
        test = next(datasets_of(cfg, ('test',)))
        for split in wanted:
            dataset = copy.deepcopy(next(datasets_of(cfg, (split,))))
            dataset.update(pipeline=copy.deepcopy(test.pipeline), test_mode=True)
            init_default_scope(self.scope)
            self.splits[split] = DATASETS.build(dataset)

    def _windows(self) -> tuple[int, int] | None:
        test = self.model.test_cfg if task_of_model(self.model) == 'segmentation' else None
        if not test or test.get('mode') != 'slide':
            return None
        return test['crop_size'][0], test['crop_size'][1]

    def _size(self, options: ExportOptions) -> tuple[bool, tuple[int, int]]:
        """Whether the size may change, and height and width: those to trace, or the fixed ones."""
        divisor = normalization_of(self.model).pad_size_divisor
        one_size = self.windows or self._resized()
        if task_of_model(self.model) == 'classification':
            one_size = one_size or crop_of(self.cfg)
        dynamic = not options.shape and (one_size is None if options.dynamic is None else options.dynamic)
        if dynamic and options.batch != 1:
            raise UserError(f'--batch {options.batch}: the number of images is not fixed\nAdd --shape H W.')
        usual = options.shape or one_size or crop_of(self.cfg) or (224, 224)
        height, width = (-(-side // divisor) * divisor for side in usual)
        if options.shape and (height, width) != tuple(options.shape):
            raise UserError(
                f'--shape {options.shape[0]} {options.shape[1]}: the config pads images to multiples of {divisor}\n'
                f'Use --shape {height} {width}.'
            )
        if options.shape and self.windows and (height, width) != self.windows:
            raise UserError(
                f'--shape {height} {width}: the config tests windows of {self.windows[0]}x{self.windows[1]}\n'
                f'Use that shape, or set model.test_cfg with --cfg-options, in tests too.'
            )
        # Small images trace faster, and show the same operators.
        return dynamic, (min(height, 256), min(width, 320)) if dynamic else (height, width)

    def _resize(self) -> dict[str, Any] | None:
        """How the test pipeline resizes images; None if it does not, or in another way."""
        steps = list(next(datasets_of(self.cfg, ('test',))).get('pipeline', []))
        step: dict = next((step for step in reversed(steps) if str(step.get('type')).endswith('Resize')), {})
        size = step.get('scale')
        if not isinstance(size, (tuple, list)):
            return None
        return dict(size=list(size), keep_ratio=step.get('keep_ratio', False))

    def _resized(self) -> tuple[int, int] | None:
        """Height and width to which the test pipeline resizes all images; None if they differ."""
        found = self.resize
        return None if found is None or found['keep_ratio'] else (found['size'][1], found['size'][0])

    def inputs(self, split: str, count: int) -> list[tuple[Tensor, ...]]:
        """Inputs of the network for evenly spaced images of a split, one image each."""
        dataset = self.splits.get(split)
        if dataset is None or not count:
            return []
        count, found = min(count, len(dataset)), list[tuple[Tensor, ...]]()
        for i in range(count):
            batch = self.model.data_preprocessor(pseudo_collate([dataset[i * len(dataset) // count]]), False)
            image, sample = torch.as_tensor(batch['inputs']), batch['data_samples'][0]
            if self.windows:
                image = image[..., : self.windows[0], : self.windows[1]]
            before = image.shape[2:]
            if not self.dynamic and tuple(before) != tuple(self.shape) and not found:
                announce(
                    f'note: {split} images are {before[0]}x{before[1]}, and are resized for the comparison; the test '
                    f'command needs images of {self.shape[0]}x{self.shape[1]}'
                )
            image = image if self.dynamic else fit_image(image, self.shape)
            size = torch.tensor([sample.metainfo['img_shape'][:2]], dtype=torch.float32)
            size = size * torch.tensor(image.shape[2:]) / torch.tensor(before)
            found.append((image, size)[: 1 + (task_of_model(self.model) == 'detection')])
        return found


def _random_inputs(model: Any, batch: int, shape: Sequence[int], names: Sequence[str], seed: int) -> tuple[Tensor, ...]:
    """Smooth random images with noise: the statistics of noise alone are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    channels = input_channels(model)
    coarse = torch.randn(batch, channels, -(-shape[0] // 32) + 1, -(-shape[1] // 32) + 1, generator=generator)
    image = fit_image(coarse, shape) + 0.3 * torch.randn(batch, channels, *shape, generator=generator)
    size = torch.tensor([[shape[0], shape[1]]] * batch, dtype=torch.float32)
    return (image, size)[: len(names)]


def _compare(model: Any, artefact: Artefact, data: _Data, options: ExportOptions) -> list[Comparison]:
    """Compare random images of several sizes and numbers, and images of the test set."""
    tolerance = TOLERANCES[options.precision]
    if options.tolerance is not None:
        tolerance = replace(tolerance, relative=math.inf, pixels=options.tolerance, objects=options.tolerance)
    height, width = data.shape
    divisor = normalization_of(model).pad_size_divisor
    cases: dict[str, list[tuple[Tensor, ...]]] = {}
    # Int8 has ranges for real images only.
    if options.precision != 'int8':
        sizes = [(1 if data.dynamic else options.batch, height, width)]
        if data.dynamic:
            sizes.append((4, height + 3 * divisor, width + 5 * divisor))  # odd, if it may be
        names = [tensor.name for tensor in artefact.manifest.inputs]
        for seed, (batch, *size) in enumerate(sizes, 1):
            cases[f'{batch} random, {size[0]}x{size[1]}'] = [_random_inputs(model, batch, size, names, seed)]
    if real := data.inputs('test', options.images):
        cases[f'{len(real)} of the test set'] = real
    comparisons = []
    for images, inputs in cases.items():
        if artefact.manifest.task == 'detection':
            pairs = [pair for each in inputs for pair in _objects(model, artefact, each)]
            comparisons += compare_objects(images, pairs, tolerance)
            continue
        head = model.decode_head if artefact.manifest.task == 'segmentation' else model.head
        with torch.no_grad():
            expected = [head(model.extract_feat(image)) for (image,) in inputs]
        found = [artefact(*each) for each in inputs]
        pairs = list(zip(expected, (outputs['logits'] for outputs in found), strict=True))
        threshold = getattr(head, 'threshold', None) or 0.5
        comparisons += compare_classes(images, pairs, tolerance, threshold)
        if 'labels' in found[0]:
            with torch.no_grad():
                maps = [torch.cat([s.pred_sem_seg.data for s in model.predict(image)]) for (image,) in inputs]
            pairs = list(zip(maps, (outputs['labels'] for outputs in found), strict=True))
            comparisons.append(compare_labels(images, pairs, tolerance))
    if not any(comparison.count for comparison in comparisons):
        announce('warning: the network finds no object in these images, so that nothing was compared', logging.WARNING)
    return comparisons


def _objects(model: Any, artefact: Artefact, inputs: tuple[Tensor, ...]) -> list[tuple[Any, Any]]:
    """What torch and the exported network find in each image."""
    from mmdet.structures import DetDataSample

    image, size = inputs
    predicted = []
    for predict in (model.predict, DetectorPrediction(model, artefact)):
        samples = []
        for height, width in size.round().int().tolist():
            meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
            samples.append(DetDataSample(metainfo={**meta, 'batch_input_shape': tuple(image.shape[2:])}))
        with torch.no_grad():
            found = predict(image, samples, rescale=True)
        predicted.append([sample.pred_instances for sample in found])
    return list(zip(*predicted, strict=True))


def _tensors(module: Any, example: tuple[Tensor, ...], dynamic: bool) -> dict[str, list[TensorInfo]]:
    """The inputs and outputs of the network, for the manifest."""
    with torch.no_grad():
        results = module(*example)
    inputs = [(name, x, _shape(x, dynamic)) for name, x in zip(module.inputs, example, strict=True)]
    outputs = [(name, x, _output_shape(name, x, dynamic)) for name, x in zip(module.outputs, results, strict=True)]
    return {
        key: [
            TensorInfo(name=name, dtype=str(x.dtype).removeprefix('torch.'), shape=shape, meaning=_MEANING[name])
            for name, x, shape in tensors
        ]
        for key, tensors in (('inputs', inputs), ('outputs', outputs))
    }


def _shape(x: Tensor, dynamic: bool) -> list[int | str]:
    if not dynamic:
        return list(x.shape)
    return [n if i == 1 else name for i, (n, name) in enumerate(zip(x.shape, _DIMENSIONS, strict=False))]


def _output_shape(name: str, x: Tensor, dynamic: bool) -> list[int | str]:
    shape: list[int | str] = list(x.shape)
    if dynamic:
        shape[0] = 'batch'
        if name == 'logits' and len(shape) == 4:
            shape[2:] = ['height of the head', 'width of the head']
        elif name == 'labels' and len(shape) == 3:
            shape[1:] = ['height', 'width']
    return shape


def _classes(cfg: Config, model: Any, meta: dict) -> dict[str, Any]:
    scope = cfg.get('default_scope', 'mmengine')
    dataset = next(datasets_of(cfg, ('test',)))
    stored = {key.lower(): value for key, value in (meta.get('dataset_meta') or {}).items()}
    known = {**getattr(dataset_class(dataset, scope), 'METAINFO', {}), **stored}
    names = [str(name) for name in classes_of(dataset, scope) or known.get('classes') or ()]
    names += [f'class {i}' for i in range(len(names), count_classes(model))]
    palette = (dataset.get('metainfo') or {}).get('palette') or known.get('palette') or []
    return dict(classes=names, palette=[list(map(int, color)) for color in palette])
