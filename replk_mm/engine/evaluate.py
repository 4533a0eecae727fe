"""Evaluate a checkpoint."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config, ConfigDict

from replk_mm.checkpoints.io import fetch_checkpoint
from replk_mm.data.checks.classes import check_heads, compare_with_checkpoint
from replk_mm.data.datasets import datasets_of, images_root, is_coco_style, named_metrics
from replk_mm.deploy.reparameterize import Changes
from replk_mm.engine.backbone import backbone_notes
from replk_mm.engine.config import build_model, fit_to_machine
from replk_mm.engine.inference import Inference, adopt_classes, load_for_inference
from replk_mm.engine.prepare import head_class_counts, prepare_data
from replk_mm.engine.process import RunOptions, init_gloo, prepare_work_dir, processes_of, select_device
from replk_mm.engine.runner import Runner, explain_failures
from replk_mm.errors import UserError
from replk_mm.evaluation.gather import absent_classes, require_ground_truth
from replk_mm.evaluation.per_image import PerImageScores
from replk_mm.logs import log_notes
from replk_mm.ops import prepack
from replk_mm.wrappers import unwrap_model


@dataclass
class Evaluation:
    """Result of a test."""

    metrics: dict[str, float]  #: scores, under the names of the config's evaluators
    #: scores of every class in the ground truth. Only the metrics of ``replk_mm`` report them
    per_class: dict[str, dict[str, float]]
    absent: list[str]  #: classes without ground truth; of these metrics
    changes: Changes | None  #: changes by ``--reparam``; None without it
    meta: dict  #: metadata of the checkpoint
    load: str  #: number of weights that the checkpoint set, for each part
    images: int  #: number of images
    seconds: float  #: duration, including data loading
    image: str | None  #: path of the first image; None if the data set does not tell
    notes: list[str] = field(default_factory=list)  #: changes of the config, one line each
    #: what the scores are made of, image by image, by the name of the score; of the same metrics
    statistics: dict[str, PerImageScores] = field(default_factory=dict)


def evaluate(
    cfg: Config,
    checkpoint: str,
    options: RunOptions,
    *,
    reparam: bool = False,
    tta: bool = False,
    predictions: Path | None = None,
) -> Evaluation:
    """Evaluate a checkpoint with the config's test loader and evaluators.

    Args:
        cfg: Changed in place.
        checkpoint: Path or URL; for a merged checkpoint, the model is merged too. Or the folder of an exported network.
        options: Device, data root, launcher and work dir are used.
        reparam: Merge and fold before evaluating.
        tta: Evaluate with the config's test-time augmentation.
        predictions: Folder for label maps (PNG) or boxes and masks (COCO result files); None writes none.

    Raises:
        UserError: If data or checkpoint do not fit.
    """
    runner, built, notes = prepare_test(cfg, checkpoint, options, reparam=reparam, tta=tta, predictions=predictions)
    runner.register_hook(dict(type='replk_mm.ProgressHook'))
    start = time.perf_counter()
    with explain_failures(cfg, runner):
        figures = runner.test()
    require_ground_truth(figures, 'test')
    seconds = time.perf_counter() - start
    per_class: dict[str, dict[str, float]] = {}
    statistics: dict[str, PerImageScores] = {}
    for metric in runner.test_evaluator.metrics:
        for name, of_class in getattr(metric, 'per_class', {}).items():
            per_class.setdefault(name, {}).update(of_class)
        statistics |= getattr(metric, 'statistics', {})
    dataset = runner.test_dataloader.dataset
    return Evaluation(
        figures,
        per_class,
        absent_classes(runner.test_evaluator.metrics),
        built.changes,
        built.meta,
        built.report.summary() if built.report else 'exported network',
        len(dataset),
        seconds,
        dataset.get_data_info(0).get('img_path'),
        notes,
        statistics,
    )


def prepare_test(
    cfg: Config,
    checkpoint: str,
    options: RunOptions,
    *,
    reparam: bool = False,
    tta: bool = False,
    predictions: Path | None = None,
) -> tuple[Runner, Inference, list[str]]:
    """Build the runner of a test and load the checkpoint. Arguments and errors are those of :func:`evaluate`.

    Returns:
        The runner, how the network was built, and changes of the config, one line each.
    """
    device = select_device(options.device)
    fetch_checkpoint(checkpoint)
    cfg.launcher = options.launcher
    cfg.work_dir = options.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(cfg.filename).stem}'
    scope = cfg.get('default_scope', 'mmengine')
    notes = backbone_notes(cfg)
    # COCO annotations name their classes; for label maps the user must.
    if options.classes is None and all(is_coco_style(dataset, scope) for dataset in datasets_of(cfg, ('test',))):
        notes += adopt_classes(cfg, checkpoint)
    notes += prepare_data(cfg, options, ('test',))
    for key in (
        'train_dataloader',
        'train_cfg',
        'optim_wrapper',
        'param_scheduler',
        'val_dataloader',
        'val_cfg',
        'val_evaluator',
        'auto_scale_lr',
    ):
        cfg.pop(key, None)
    notes += fit_to_machine(cfg, None, device, processes_of(options.launcher)[1])
    model = build_model(cfg, 'meta')
    check_heads(cfg, head_class_counts(model), ('test',))
    prepare_work_dir(cfg.work_dir)
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('init_cfg', None)  # the checkpoint sets every weight
    if predictions:
        notes += _export_predictions(cfg, predictions)
    # mmengine would load the initial weights of the config over those of the checkpoint.
    cfg.load_from, cfg.resume = None, False
    if tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise UserError(f'--tta: {cfg.filename} has no tta_model and tta_pipeline')
        for dataset in datasets_of(cfg, ('test',)):
            dataset['pipeline'] = cfg.tta_pipeline
        if 'tta_test_cfg' in cfg:
            cfg.model.test_cfg = cfg.tta_test_cfg
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.visualizer = {**cfg.get('visualizer', {}), 'vis_backends': []}
    init_gloo(cfg, device)
    runner = Runner.from_cfg(cfg)
    log_notes(notes)
    model = unwrap_model(runner.model).module if tta else unwrap_model(runner.model)
    built = load_for_inference(model, checkpoint, reparam, cfg.get('resize_kernels'))
    compare_with_checkpoint(cfg, built.meta, checkpoint)
    prepack(model)
    return runner, built, notes


def _export_predictions(cfg: Config, folder: Path) -> list[str]:
    """Configure the metrics to write predictions: label maps as PNG, boxes and masks as ``instances.*.json``."""
    notes = []
    detections = 0
    for place, metric in named_metrics(cfg, 'test').items():
        scope, _, kind = str(metric.get('type')).rpartition('.')
        if kind == 'IoUMetric':
            metric['output_dir'] = str(folder)
            if scope == 'replk_mm':
                metric['images_root'] = images_root(cfg)
        elif kind == 'CocoMetric':
            detections += 1
            metric['outfile_prefix'] = str(folder / ('instances' if detections == 1 else f'instances_{detections}'))
        else:
            notes.append(f'predictions: not written; {place}.type={metric.get("type")} cannot write them')
    return notes
