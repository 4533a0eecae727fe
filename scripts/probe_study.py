#!/usr/bin/env python3
"""Does the order of backbones by linear probe predict their order after fine-tuning? The result: docs/statistics.md.

1. Pretrain each network to classify generated patches (``patches.py``).
2. Probe the frozen network, and fine-tune it, on generated scenes with other objects, with three seeds each.
3. Correlate the scores, and count the points that the pick of the probe loses after fine-tuning.

Every step appends a line to ``results.jsonl`` of the work directory, and is skipped when it is there. An interrupted
pretraining continues after its last epoch. Processes may share a work directory; each takes one shard of the networks.

Example:
    python scripts/probe_study.py run work_dirs/probe_study --shard 1/2 &
    python scripts/probe_study.py run work_dirs/probe_study --shard 2/2
    python scripts/probe_study.py report work_dirs/probe_study
"""

import argparse
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')  # one process per core; read when torch is imported
warnings.simplefilter('ignore')

import numpy as np  # noqa: E402
import torch  # noqa: E402
from classify import Classifier, Recipe, train_classifier  # noqa: E402
from filelock import FileLock  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from mmengine.config import Config  # noqa: E402
from numpy.typing import ArrayLike, NDArray  # noqa: E402
from patches import PATCH_CLASSES, PatchDataset  # noqa: E402
from scipy import stats  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from replk_mm.backbones.catalogue import build_backbone  # noqa: E402
from replk_mm.data.scenes.writer import META, write_demo_data  # noqa: E402
from replk_mm.engine.config import load_config  # noqa: E402
from replk_mm.engine.evaluate import evaluate  # noqa: E402
from replk_mm.engine.prepare import prepare_training  # noqa: E402
from replk_mm.engine.probe import ProbeSettings, prepare_probe, probe  # noqa: E402
from replk_mm.engine.process import RunOptions, setup_process  # noqa: E402
from replk_mm.engine.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'upernet_replk-nano_demo.py'
SECTION = """## Does the order by linear probe predict the order by fine-tuning?

`python scripts/probe_study.py` pretrains small networks on generated patches, and probes and fine-tunes them on
generated scenes. *Regret* is what the network with the highest predictor has less mIoU than the best one after
fine-tuning. Intervals are percentiles of a bootstrap over networks and seeds: they are for other networks too.
Pretraining and fine-tuning take minutes, and scores are low: long trainings may give another order.
Two networks are left out because their short pretraining stayed at chance: convnext-atto and moganet-xtiny."""
BEGIN, END = '<!-- probe_study:begin -->\n', '<!-- probe_study:end -->'
SEEDS = (0, 1, 2)
SCALE = dict(layer_scale_init_value=1.0)  # a small initial scale is for trainings of many epochs
SMALL = dict(layers=[2, 2, 4, 2], channels=[32, 64, 128, 256], dw_ratio=1, small_kernel=None)
#: Name in the catalogue, arguments that change the network, and further ones for its pretraining, by name.
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    'resnet-18': ('mmseg.ResNet(depth=18)', {}, {}),
    'replknet-nano': ('replknet-nano', {}, {}),
    'replknet-nano-3': ('replknet-nano', dict(arch={**SMALL, 'large_kernel_sizes': [3, 3, 3, 3]}), {}),
    'mscan-t': ('mscan-t', {}, {}),
    'inceptionnext-atto': ('inceptionnext-atto', {}, SCALE),
    'replknet-nano-13': ('replknet-nano', dict(arch={**SMALL, 'large_kernel_sizes': [13, 13, 13, 13]}), {}),
    'van-b0': ('van-b0', {}, {}),
    'unireplknet-a': ('unireplknet-a', {}, SCALE),
}
#: Pretraining. Patches and scenes have other seeds: the target task shows no object again.
PATCH_SEED, PATCHES, VAL_PATCHES, SIDE = 1000, 3200, 480, 64
BATCH, PRETRAINING = 16, Recipe(epochs=3, lr=1e-3, label_smoothing=0.0)
#: Target task: training scenes, and validation scenes. One half picks a network, the other half judges the pick.
TRAIN, VAL, SCENE_SIDE = 200, 120, 128
ITERATIONS, LR, PROBE_EPOCHS = 240, 1e-3, 20
#: Of the bootstrap.
DRAWS = 5000


def seeds_of(step: str) -> tuple[int, ...]:
    """A network has one pretraining, as in practice."""
    return SEEDS[:1] if step == 'pretrain' else SEEDS


def scene_config(network: str, weights: Path | None) -> Config:
    """The config of the target task with a network of the study."""
    name, arguments, _ = NETWORKS[network]
    options: dict[str, Any] = {'backbone': name, 'optim_wrapper.optimizer.lr': LR, 'default_hooks.logger.interval': 50}
    for split in ('train', 'val', 'test'):
        options |= {f'{split}_dataloader.num_workers': 0, f'{split}_dataloader.persistent_workers': False}
    cfg = load_config(str(CONFIG), options)
    cfg.model.backbone.update(arguments)
    if weights:
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(weights))
    return cfg


def pretrain(network: str, seed: int, out: Path, deadline: float) -> float:
    """Top-1 accuracy in percent on the validation patches."""
    name, arguments, initial = NETWORKS[network]
    patches = out / 'patches.pt'
    with FileLock(out / 'lock'):
        if not patches.is_file():
            splits = [
                PatchDataset(PATCH_SEED, split, n, SIDE) for split, n in (('train', PATCHES), ('val', VAL_PATCHES))
            ]
            torch.save(splits, patches)
    train_patches, val_patches = torch.load(patches, weights_only=False)  # of this script
    torch.manual_seed(seed)
    model = Classifier(build_backbone(name, **arguments, **initial), len(PATCH_CLASSES))

    def report(line: str) -> None:
        print(line, flush=True)
        if time.time() > deadline:
            raise OutOfTime

    loaders = DataLoader(train_patches, BATCH, shuffle=True, drop_last=True), DataLoader(val_patches, BATCH)
    return train_classifier(model, *loaders, out / 'pretrained' / network, PRETRAINING, report=report)[-1]


def fine_tune(network: str, seed: int, out: Path, deadline: float) -> float:
    """mIoU on the second half of the validation scenes, after the training of all weights."""
    cfg = scene_config(network, out / 'pretrained' / network / 'backbone.pth')
    work_dir = str(out / 'fine-tuned' / f'{network}-{seed}')
    options = RunOptions(str(out / 'scenes'), work_dir=work_dir, max_iters=ITERATIONS, seed=seed, overwrite=True)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    checkpoint = train(cfg, prepare_training(cfg, options), preflight=False, overwrite=True)
    return score(scene_config(network, None), checkpoint, out, range(VAL // 2, VAL), work_dir)


def score(cfg: Config, checkpoint: Path, out: Path, scenes: range, work_dir: str) -> float:
    """mIoU of a checkpoint on some of the validation scenes."""
    cfg.test_dataloader.dataset.indices = list(scenes)
    options = RunOptions(str(out / 'scenes'), work_dir=f'{work_dir}/test')
    return evaluate(cfg, str(checkpoint), options).metrics['mIoU']


def linear_probe(network: str, seed: int, out: Path, deadline: float) -> float:
    """mIoU on the first half of the validation scenes of a linear layer on the frozen features."""
    cfg = scene_config(network, out / 'pretrained' / network / 'backbone.pth')
    work_dir = str(out / 'probes' / f'{network}-{seed}')
    notes = prepare_probe(cfg, RunOptions(str(out / 'scenes'), work_dir=work_dir, overwrite=True))
    found = probe(cfg, notes, ProbeSettings(epochs=PROBE_EPOCHS, seed=seed, cache=out / 'features'))
    return score(load_config(str(found.config)), found.checkpoint, out, range(VAL // 2), work_dir)


STEPS: dict[str, Callable[[str, int, Path, float], float]] = {
    'pretrain': pretrain,
    'probe': linear_probe,
    'fine_tune': fine_tune,
}


class OutOfTime(Exception):
    """The minutes of this call are over; the next call continues."""


def run(out: Path, networks: list[str], steps: list[str], minutes: float) -> None:
    """Run the steps that are not in the results yet; begin none after some minutes."""
    setup_process()
    torch.set_num_threads(1)
    deadline = time.time() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / 'lock'):
        if not (out / 'scenes' / META).is_file():
            write_demo_data(out / 'scenes', train=TRAIN, val=VAL, size=(SCENE_SIDE, SCENE_SIDE))
    for step in steps:
        for seed, network in itertools.product(seeds_of(step), networks):
            if (step, network, seed) in read(out):
                continue
            if time.time() > deadline:
                raise OutOfTime
            start = time.time()
            found = STEPS[step](network, seed, out, deadline)
            line = dict(step=step, network=network, seed=seed, score=found, seconds=round(time.time() - start, 1))
            with (out / 'results.jsonl').open('a') as file:
                file.write(json.dumps(line) + '\n')
            print(line, flush=True)


def read(out: Path) -> dict[tuple[str, str, int], float]:
    """The scores by step, network and seed."""
    path = out / 'results.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {(line['step'], line['network'], line['seed']): line['score'] for line in lines}


def rank_agreement(predictor: ArrayLike, target: ArrayLike) -> dict[str, tuple[float, float, float]]:
    """Whether a cheap score orders networks as an expensive one does: values and ends of 95 % intervals.

    The intervals are for other networks and seeds: percentiles of a hierarchical bootstrap of networks, and of seeds
    within each, of predictor and target independently. In simulations of 9 and 12 networks, those of Spearman's
    correlation cover 95 to 99 %.

    Args:
        predictor: Scores ``(networks, seeds)``.
        target: Scores ``(networks, seeds)`` of the same networks; the number of seeds may differ.

    Returns:
        ``'spearman'`` and ``'kendall'`` (tau-b) correlations of the means; ``'regret'``: what the network with the
        highest predictor has less than the best one; ``'random_regret'``: the mean of that over all networks. NaN if
        undefined.
    """
    scores = [np.asarray(values, float) for values in (predictor, target)]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(scores[0]), size=(DRAWS, len(scores[0])))
    values = [x[drawn] for x in scores]
    means = [np.take_along_axis(x, rng.integers(x.shape[2], size=x.shape), 2).mean(2) for x in values]
    found, samples = (_agreement(*pair) for pair in ([x.mean(1)[None] for x in scores], means))
    ends = {
        name: np.quantile(kept, [0.025, 0.975]) if len(kept := sample[np.isfinite(sample)]) else (np.nan, np.nan)
        for name, sample in samples.items()
    }
    return {name: (float(value[0]), *map(float, ends[name])) for name, value in found.items()}


def _agreement(x: NDArray, y: NDArray) -> dict[str, NDArray]:
    """The statistics of :func:`rank_agreement` of each draw ``(draws, networks)``."""

    def correlation(a: NDArray, b: NDArray) -> NDArray:
        with np.errstate(invalid='ignore'):
            return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))

    ranks = [stats.rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (x, y)]
    signs = [np.sign(values[:, :, None] - values[:, None]).reshape(len(values), -1) for values in (x, y)]
    best, picked = y.max(1), np.take_along_axis(y, x.argmax(1)[:, None], 1)[:, 0]
    return dict(
        spearman=correlation(*ranks), kendall=correlation(*signs), regret=best - picked, random_regret=best - y.mean(1)
    )


def report(out: Path, page: Path) -> None:
    """Write the table, the correlations and the scatter plot of finished networks into a block of a page."""
    scores = read(out)
    names = [n for n in NETWORKS if all((step, n, seed) in scores for step in STEPS for seed in seeds_of(step))]
    of_step = {step: np.array([[scores[step, n, seed] for seed in seeds_of(step)] for n in names]) for step in STEPS}
    mean = {step: values.mean(1) for step, values in of_step.items()}
    table = ['| Network | Pretraining, top-1 | Probe, mIoU | Fine-tuning, mIoU |', '| --- | ---: | ---: | ---: |']
    for i in np.argsort(-mean['fine_tune']):
        cells = [f'{mean[step][i]:.1f}' for step in STEPS]
        for k, step in ((1, 'probe'), (2, 'fine_tune')):
            cells[k] += f' ({", ".join(f"{x:.1f}" for x in of_step[step][i])})'
        table.append(f'| {names[i]} | {" | ".join(cells)} |')
    rows = ['| Predictor | Spearman | Kendall | Regret of its pick, points |', '| --- | ---: | ---: | ---: |']
    for step, label in (('probe', 'linear probe'), ('pretrain', 'accuracy of the pretraining')):
        found = {
            key: f'{value:.2f} [{low:.2f}, {high:.2f}]'
            for key, (value, low, high) in rank_agreement(of_step[step], of_step['fine_tune']).items()
        }
        rows.append(f'| {label} | {found["spearman"]} | {found["kendall"]} | {found["regret"]} |')
    rows.append(f'| a random pick | | | {found["random_regret"]} |')
    draw(names, mean, page.parent / 'images' / 'probe_study.png')
    settings = (
        f'{len(names)} networks; {PATCHES} patches of {SIDE} pixels in {len(PATCH_CLASSES)} classes, '
        f'{PRETRAINING.epochs} epochs; {TRAIN} training scenes of {SCENE_SIDE} pixels, {ITERATIONS} iterations of 8. '
        f'The probe is tested on {VAL // 2} scenes, fine-tuning on {VAL - VAL // 2} others. Single seeds in brackets.'
    )
    picture = '![mIoU after fine-tuning against mIoU of the linear probe](images/probe_study.png)'
    block = '\n\n'.join(('\n'.join(table), '\n'.join(rows), settings, picture))
    text = page.read_text()
    if BEGIN not in text:
        text = f'{text.rstrip()}\n\n{SECTION}\n\n{BEGIN}{END}'
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f'{head}{block}\n{tail}')


def draw(names: list[str], mean: dict[str, np.ndarray], path: Path) -> None:
    """Plot fine-tuning against both predictors."""
    fig = Figure(figsize=(9, 4), layout='constrained')
    axes = fig.subplots(1, 2, sharey=True)
    for ax, step, label in zip(axes, ('probe', 'pretrain'), ('probe, mIoU', 'pretraining, top-1 (%)'), strict=True):
        ax.scatter(mean[step], mean['fine_tune'])
        for name, x, y in zip(names, mean[step], mean['fine_tune'], strict=True):
            ax.annotate(name, (x, y), fontsize=7, xytext=(3, 3), textcoords='offset points')
        ax.set_xlabel(label)
    axes[0].set_ylabel('fine-tuning, mIoU')
    fig.savefig(path, dpi=110, metadata={'Software': 'replk_mm'})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('action', choices=['run', 'report'])
    p.add_argument('out', type=Path, help='work directory')
    p.add_argument('--only', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME', help='networks')
    p.add_argument('--steps', nargs='+', choices=STEPS, default=list(STEPS), metavar='STEP', help=', '.join(STEPS))
    p.add_argument('--shard', default='1/1', metavar='I/N', help='every Nth network, from the Ith (default: 1/1)')
    p.add_argument('--minutes', type=float, default=1e6, help='begin nothing after N minutes, and exit with status 3')
    p.add_argument('--page', type=Path, default=ROOT / 'docs' / 'statistics.md', help='page that report updates')
    args = p.parse_args()
    if args.action == 'run':
        first, step = map(int, args.shard.split('/'))
        try:
            run(args.out, args.only[first - 1 :: step], args.steps, args.minutes)
        except OutOfTime:
            raise SystemExit(3) from None
    else:
        report(args.out, args.page)


if __name__ == '__main__':
    main()
