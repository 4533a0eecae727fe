"""Train and test what a config describes, on the machine at hand."""
import errno
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_rank
from mmengine.model import is_model_wrapper
from mmengine.runner import find_latest_checkpoint

from replk_mm import checkpoints
from replk_mm.data.checks import check_data, datasets_of
from replk_mm.engine import memory
from replk_mm.engine.config import as_list, build_model, fit_to_machine, set_data_root, shorten
from replk_mm.engine.loop import Runner
from replk_mm.errors import UserError
from replk_mm.reparam import Changes, compare, reparameterize


@dataclass
class Options:
    """What a command line may say of a run.

    Attributes:
        data_root: Folder of the data set; None for the config's.
        work_dir: Where logs and checkpoints go; None for ``work_dirs/CONFIG``.
        max_iters: Train for so many iterations; None for the config's schedule.
        resume: ``'auto'`` for the last checkpoint of the work dir, or a checkpoint; None starts anew.
        pretrained: Checkpoint for the backbone, ``'none'`` for random weights, None for the config's.
        amp: ``'bf16'``, ``'fp16'`` or None.
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'``, or None for what is there.
        seed: Of all randomness; None draws one and records it.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        memory_check: Lower the batch to what fits the memory.
    """

    data_root: str | None = None
    work_dir: str | None = None
    max_iters: int | None = None
    resume: str | None = None
    pretrained: str | None = None
    amp: str | None = None
    device: str | None = None
    seed: int | None = None
    launcher: str = 'none'
    memory_check: bool = True


def select_device(name: str | None) -> str:
    """Make ``name`` the device that everything after uses. Call before anything touches CUDA.

    Returns:
        ``'cpu'`` or ``'cuda'``.

    Raises:
        UserError: If the device does not exist.
    """
    kind, _, index = (name or '').partition(':')
    if kind == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif kind == 'cuda':
        if index:
            os.environ['CUDA_VISIBLE_DEVICES'] = index
        if not torch.cuda.is_available():
            raise UserError(f'--device {name}: torch {torch.__version__} finds no such GPU\n'
                            f'Use --device cpu; python tools/doctor.py says what is there.')
    elif kind:
        raise UserError(f'--device {name}: unknown; use cpu, cuda or cuda:N')
    return 'cuda' if kind != 'cpu' and torch.cuda.is_available() else 'cpu'


def _processes(launcher: str) -> tuple[int, int]:
    """Processes of the whole run, and of this machine, as torchrun or Slurm announce them."""
    def announced(*names: str) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, '').isdigit()), 1)

    if launcher == 'none':
        return 1, 1
    total = announced('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
    return total, min(total, announced('LOCAL_WORLD_SIZE', 'SLURM_NTASKS_PER_NODE', 'OMPI_COMM_WORLD_LOCAL_SIZE'))


def last_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint that training in ``work_dir`` wrote last, also if the folder has been moved since."""
    named = find_latest_checkpoint(str(work_dir))
    moved = Path(work_dir) / Path(named).name if named else None
    return str(moved) if moved and moved.is_file() else named


def _init_gloo(launcher: str, device: str) -> None:
    # mmengine 0.10.7 selects a CUDA device whatever the backend; a process group that exists is left alone.
    if launcher == 'pytorch' and device == 'cpu' and not torch.distributed.is_initialized():
        if 'RANK' not in os.environ:
            raise UserError('--launcher pytorch: no RANK in the environment\n'
                            'Start with: torchrun --nproc-per-node N tools/train.py CONFIG --launcher pytorch')
        torch.distributed.init_process_group('gloo')


def num_classes_of(model: nn.Module) -> int | None:
    """Classes of a segmentor's main head, None for other models."""
    head = getattr(model, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


def prepare_work_dir(path: str | Path, needed: int = 0) -> Path:
    """Create a folder and see that it can be written to and that ``needed`` bytes fit.

    Raises:
        UserError: If not.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.write-test-{os.getpid()}'
        probe.write_bytes(b'0')
        probe.unlink()
    except OSError as error:
        raise UserError(f'work dir {folder}: cannot be written to ({error.strerror})\nChoose another with --work-dir DIR.'
                        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f'work dir {folder}: {free / 2**30:.2f} GiB free; a checkpoint takes {needed / 2**30:.2f} GiB\n'
                        f'Make room, or choose another place with --work-dir DIR.')
    return folder


def prepare_training(cfg: Config, options: Options) -> list[str]:
    """Apply the options, check data and memory, fit the config to this machine.

    Args:
        cfg: Changed in place until :class:`Runner` can take it.
        options: What the user said.

    Returns:
        What was changed or checked, a line each.

    Raises:
        UserError: If something stands in the way of training.
    """
    device = select_device(options.device)
    processes, local_processes = _processes(options.launcher)
    _init_gloo(options.launcher, device)  # first, for the processes agree on the batch
    cfg.launcher = options.launcher
    cfg.work_dir = options.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(cfg.filename).stem}'
    if options.data_root:
        set_data_root(cfg, options.data_root)
    notes = []
    if options.max_iters is not None:
        notes.append(shorten(cfg, options.max_iters))
    notes += fit_to_machine(cfg, options.amp, device, local_processes)
    model = build_model(cfg, 'meta')
    memory.check_batch(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    # Weights and Adam's moments; the old checkpoint goes only when the new one is written.
    prepare_work_dir(cfg.work_dir, needed=2 * 12 * parameters)
    notes += check_data(cfg, ('train', 'val'), num_classes_of(model))
    _check_while_loading(cfg, num_classes_of(model))
    _metrics_per_class(cfg)
    if options.memory_check and device == 'cpu':
        notes += memory.fit_batch(cfg, model, local_processes)
    notes += _scale_learning_rate(cfg, processes)
    notes += _weights_to_start_from(cfg, options)
    notes += _seed(cfg, options, model)
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    if hook and hook.get('type') == 'CheckpointHook':
        hook['type'] = 'replk_mm.CheckpointHook'
    return notes


def _check_while_loading(cfg: Config, num_classes: int | None) -> None:
    def checked(step):
        if isinstance(step, (list, tuple)):
            return [checked(part) for part in step]
        if step.get('type') in ('LoadImageFromFile', 'LoadAnnotations'):
            return ConfigDict(type='replk_mm.CheckedLoad', load=step, num_classes=num_classes)
        return ConfigDict({**step, 'transforms': checked(step['transforms'])}) if 'transforms' in step else step

    for dataset in datasets_of(cfg):
        dataset['pipeline'] = checked(dataset['pipeline'])


def _metrics_per_class(cfg: Config) -> list[ConfigDict]:
    """Let segmentation metrics be ours, which keep the figures of every class; returns their configs."""
    found = [metric for key in ('val_evaluator', 'test_evaluator') for metric in as_list(cfg.get(key))
             if metric.get('type') in ('IoUMetric', 'mmseg.IoUMetric', 'replk_mm.IoUMetric')]
    for metric in found:
        metric['type'] = 'replk_mm.IoUMetric'
    return found


def _scale_learning_rate(cfg: Config, processes: int) -> list[str]:
    scaling = cfg.get('auto_scale_lr')
    actual = cfg.train_dataloader.batch_size * processes
    if not scaling or scaling.base_batch_size == actual:
        return []
    rate = cfg.optim_wrapper.optimizer.lr
    if not scaling.get('enable'):
        return [f'learning rate: {rate} as configured for {scaling.base_batch_size} images a step; this run has {actual} '
                f'(auto_scale_lr.enable=True scales)']
    ratio = actual / scaling.base_batch_size
    return [f'learning rate: {rate} x {actual}/{scaling.base_batch_size} = {rate * ratio:.3g}, for {actual} images a step '
            f'instead of {scaling.base_batch_size} (auto_scale_lr.enable=False keeps it)']


def _weights_to_start_from(cfg: Config, options: Options) -> list[str]:
    backbone = cfg.model.get('backbone', {})
    if options.pretrained == 'none':
        backbone.pop('init_cfg', None)
        return ['weights: random (--pretrained none)']
    if options.pretrained:
        backbone['init_cfg'] = ConfigDict(type='Pretrained', checkpoint=options.pretrained)
    source = next((c for c in as_list(backbone.get('init_cfg')) if c.get('type') == 'Pretrained'), None)
    if source is None or options.resume:
        return []
    try:
        if not options.pretrained and not str(backbone.get('type')).startswith('replk_mm.'):
            return []  # another package's backbone loads with mmengine, which knows more kinds of address
        checkpoints.fetch(source['checkpoint'])
    except checkpoints.DownloadError as error:
        # A shortened run is not the published recipe anyway; a full one must not start from the wrong weights.
        if options.max_iters is None:
            raise
        backbone.pop('init_cfg')
        return [f'WEIGHTS: RANDOM. {str(error).splitlines()[0]}; going on because --max-iters makes this a trial run']
    return []


def _seed(cfg: Config, options: Options, model: nn.Module) -> list[str]:
    """Fix the seed: given, else that of the checkpoint to resume (its data order depends on it), else mmengine draws."""
    notes = []
    if options.seed is not None:
        cfg.randomness = {**cfg.get('randomness', {}), 'seed': options.seed}
        notes.append(f'seed: {options.seed}')
    if not options.resume:
        return notes
    last = options.resume if options.resume != 'auto' else last_checkpoint(cfg.work_dir)
    if last is None:
        return [*notes, f'resume: no checkpoint in {cfg.work_dir} yet, starting anew']
    loaded = checkpoints.read(last)
    if 'optimizer' not in loaded:
        merged = checkpoints.reparameterization_of(loaded, ())
        raise UserError(f'{last}: cannot be resumed: it has no optimizer state'
                        + (' (reparameterized checkpoints are for inference)' if merged else '')
                        + '\nResume from a checkpoint that training wrote.')
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    stored = {key: value.shape for key, value in checkpoints.unwrap(loaded, str(last)).items()}
    differing = sorted(key for key in shapes.keys() | stored.keys() if shapes.get(key) != stored.get(key))
    if differing:
        raise UserError(f'{last}: cannot be resumed: it is of another network; {len(differing)} of {len(shapes)} weights '
                        f'differ, {differing[0]} first\nResume with the config it was trained with.')
    cfg.load_from, cfg.resume = str(last), True
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': loaded['meta'].get('seed')}
    return [*notes, f'resume: {last}, iteration {loaded["meta"]["iter"]}, seed {loaded["meta"].get("seed")}']


def train(cfg: Config, notes: list[str]) -> Path:
    """Train a prepared config.

    Returns:
        The last checkpoint.

    Raises:
        UserError: If the data, the disk or the memory fail on the way.
        KeyboardInterrupt: On Ctrl-C, after saying how to go on.
    """
    runner = Runner.from_cfg(cfg)
    for note in notes:
        runner.logger.info(note)
    try:
        runner.train()
    except KeyboardInterrupt:
        last = last_checkpoint(cfg.work_dir)
        if get_rank() == 0:
            print(f'\nstopped at iteration {runner.iter}; '
                  + (f'--resume goes on from {last}' if last else 'no checkpoint was written yet'), file=sys.stderr)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            last = last_checkpoint(cfg.work_dir)
            raise UserError(f'{cfg.work_dir}: writing failed at iteration {runner.iter} ({error.strerror})\n'
                            f'Make room or mend the permissions, then go on with --resume'
                            + (f' {last}.' if last else '.')) from error
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or 'alloc' in str(error) or 'out of memory' in str(error):
            raise UserError(
                f'out of memory at iteration {runner.iter}, crop size {memory.crop_of(cfg)}, '
                f'{cfg.train_dataloader.batch_size} images a process: {(str(error) or "no memory").splitlines()[0]}\n'
                f'Lower train_dataloader.batch_size or the crop size, or set model.backbone.with_cp=True.') from error
        raise
    last = last_checkpoint(cfg.work_dir)
    return Path(last) if last else Path(cfg.work_dir)


@dataclass
class TestResult:
    """What a test measured.

    Attributes:
        metrics: As the config's evaluators name them.
        per_class: Figures of every class in the labels, of segmentation metrics.
        changes: What ``--reparam`` did, None if it was not asked for.
        meta: The checkpoint's own record.
        load: How many weights the checkpoint set, of each part.
        images: Images evaluated.
        seconds: Of the evaluation, data loading included.
        notes: What was changed for this machine.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    changes: Changes | None
    meta: dict
    load: str
    images: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def test(cfg: Config, checkpoint: str, options: Options, *, reparam: bool = False, tta: bool = False, trust: bool = False,
         predictions: Path | None = None) -> TestResult:
    """Evaluate a checkpoint with the config's test loader and evaluators.

    Args:
        cfg: Changed in place.
        checkpoint: Path or address; a merged one brings the model to its structure.
        options: Device, data root, launcher and work dir are used.
        reparam: Merge and fold before evaluating.
        tta: Evaluate with the config's test-time augmentation.
        trust: See :func:`replk_mm.checkpoints.read`.
        predictions: Folder for label maps as PNG, None for none.

    Raises:
        UserError: If data or checkpoint do not fit.
    """
    device = select_device(options.device)
    checkpoints.fetch(checkpoint)
    cfg.launcher = options.launcher
    cfg.work_dir = options.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(cfg.filename).stem}'
    if options.data_root:
        set_data_root(cfg, options.data_root)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg',
                'val_evaluator', 'auto_scale_lr'):
        cfg.pop(key, None)
    notes = fit_to_machine(cfg, None, device, _processes(options.launcher)[1])
    model = build_model(cfg, 'meta')
    prepare_work_dir(cfg.work_dir)
    notes += check_data(cfg, ('test',), num_classes_of(model))
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('init_cfg', None)  # every weight comes from the checkpoint
    for metric in _metrics_per_class(cfg):
        if predictions:
            metric['output_dir'] = str(predictions)
    if tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise UserError(f'--tta: {cfg.filename} has no tta_model and tta_pipeline')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    _check_while_loading(cfg, num_classes_of(model))
    cfg.visualizer = {**cfg.get('visualizer', {}), 'vis_backends': []}
    _init_gloo(options.launcher, device)
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    model = model.module if tta else model
    report, meta = checkpoints.load_model(model, checkpoint, trust)
    changes = None
    if reparam:
        changes = reparameterize(model, inplace=True)[1]
    start = time.perf_counter()
    metrics = runner.test()
    seconds = time.perf_counter() - start
    per_class = {name: figures for metric in runner.test_evaluator.metrics
                 for name, figures in getattr(metric, 'per_class', {}).items()}
    images = len(runner.test_dataloader.dataset)
    return TestResult(metrics, per_class, changes, meta, report.summary(), images, seconds, notes)


def reparameterize_checkpoint(cfg: Config, checkpoint: str, out: str | Path, trust: bool = False,
                              shape: tuple[int, int] = (64, 64)) -> tuple[Changes, list]:
    """Merge and fold a trained checkpoint, prove that it computes the same, and write it.

    Args:
        cfg: The config it was trained with.
        checkpoint: Path or address, in training form (or merged already: then it is written again as it is).
        out: File to write. Nothing is written if the proof fails.
        trust: See :func:`replk_mm.checkpoints.read`.
        shape: Height and width of the random image of the proof, in pixels.

    Returns:
        What was changed, and the differences found.

    Raises:
        UserError: If the checkpoint does not fit, the outputs differ beyond the tolerance, or ``out`` cannot be written.
    """
    if Path(out).resolve() == Path(checkpoint).resolve():
        raise UserError(f'{out}: is the input itself; the merged network gets a file of its own')
    fit_to_machine(cfg, None, 'cpu', 1)
    if 'backbone' in cfg.model:
        cfg.model.backbone.pop('init_cfg', None)
    model = build_model(cfg)
    _, meta = checkpoints.load_model(model, checkpoint, trust)
    merged, changes = reparameterize(model)
    differences = compare(model.eval(), merged, (1, 3, *shape))
    if not all(d.ok for d in differences):
        raise UserError(f'{checkpoint}: the merged network computes something else, nothing was written\n'
                        + '\n'.join(map(str, differences)))
    former = checkpoints.reparameterization_of({'meta': meta}, merged.state_dict()) or {}
    record = dict(merge=bool(changes.merged) or former.get('merge', True), fold=True,
                  source=str(checkpoint), source_sha256=checkpoints.sha256(checkpoints.fetch(checkpoint)),
                  differences=[dict(dtype=str(d.dtype), absolute=d.absolute, relative=d.relative) for d in differences])
    plain = {key: value for key, value in meta.items() if isinstance(value, (str, int, float, bool, dict, list, tuple))}
    checkpoints.save({'meta': {**plain, 'replk_mm': {'reparameterized': record}}, 'state_dict': merged.state_dict()}, out)
    return changes, differences
