"""Readers of what a user types: overrides and suite files, and hostile ones."""
import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from fuzz.mutate import Build, Choices, changed_bytes, edited
from replk_mm.errors import UserError


def overrides(folder: Path, file: Path) -> Callable[[], object]:
    """Reads --cfg-options and changes a config."""
    from mmengine.config import Config, config
    from yapf.yapflib.yapf_api import pytree_utils

    from replk_mm import cli
    from replk_mm.engine.overrides import merge

    p = cli.parser('', '')
    cli.add_config_options(p)

    def one() -> None:
        texts = file.read_bytes().decode('utf-8', 'surrogateescape').split('\n')
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                options = p.parse_args(['--cfg-options', *texts]).cfg_options
        except SystemExit as left:
            if left.code != 2:
                raise
            raise UserError(said.getvalue().splitlines()[-1]) from left
        cfg = Config(copy.deepcopy(_CONFIG))
        merge(cfg, options, 'config.py')
        with mock.patch.object(config, 'FormatCode', lambda text, **_: (str(pytree_utils.ParseCodeToTree(text)), True)):
            cfg.pretty_text  # noqa: B018 (every run writes it; how it is wrapped into lines takes the most time)

    for text in ('a=1', 'model.x=[1,(2,3)]', '=', 'a', "model={'a': 1}", 'train_dataloader.dataset.pipeline.0.type=1'):
        file.write_text(text)
        with contextlib.suppress(UserError):
            one()
    return one


_CONFIG = dict(
    model=dict(type='X', backbone=dict(arch='nano', out_indices=(0, 1)), heads=[dict(a=1), dict(b=2)]),
    train_dataloader=dict(batch_size=2, dataset=dict(pipeline=[dict(type='L')])),
    optim_wrapper=dict(optimizer=dict(lr=0.1)),
    val_dataloader=None,
    flag=True,
    names=['a', 'b'],
)
_OPTIONS = (
    b'model.backbone.arch=nano', b'model.heads.0.a=2', b'train_dataloader.dataset.pipeline.0.type=M',
    b"model={'a': [1, 2]}", b'optim_wrapper.optimizer.lr=1e-3', b'names=[a,(b,c)]', b'x.y.z=None', b'flag=False',
    b'model._delete_=True', b'names.5=1')
_TYPED = (
    b'.', b'=', b'[', b']', b'(', b')', b'{', b'}', b',', b'"', b"'", b'0', b'-1', b'99999999', b'_base_', b'_delete_',
    b'__class__', b'__import__("os").system("touch x")', b'9**9**9', b'{1:', b'$(id)', b'\n', b'\0', b'\x1b[2J', b'\xff',
    b'(' * 300, b'{' * 90, b'9' * 5000, b'--x', b'@file', b'{{fileDirname}}', b'{{$HOME:x}}', b'1e999', b'0x', b'pop',
    b'filename', b'text', b'a' * 2000, b'..', b'.a' * 400, b'class', b'{0x' + b'f' * 4000 + b'}')


def options() -> Build:
    """Spoiled overrides, a line each."""
    def build(choices: Choices) -> bytes:
        texts = [choices.pick(_OPTIONS) for _ in range(1 + choices.below(3))]
        for _ in range(choices.below(4)):
            i = choices.below(len(texts))
            at = choices.below(len(texts[i]) + 1)
            texts[i] = texts[i][:at] + choices.pick(_TYPED) + texts[i][at + choices.below(2) * choices.below(9) :]
        return b'\n'.join(texts)

    return build


_SUITE = b"""name: made_up
question: Is it?
data: {scenes: context, train: 8, val: 4, seed: 1, size: [96, 96]}
defaults: {config: a.py, iterations: 30, seeds: [0, 1], measure: [complexity, metric, speed], options: {model.x: 1e-3}}
rows:
- {name: a, label: A, shape: [96, 96], batch: 2, erf: {size: 64, count: 2}}
- name: b
  config: mmseg::x.py
  checkpoint: 'x.{seed}.pth'
- &row {name: c, schedule: full, published: false, pretraining: none, data_root: d, macs_shape: [64, 64]}
"""
_YAML = (
    b'!!python/object/apply:os.system ["touch x"]', b'!!python/name:os.system', b'&a [*a]', b'*row', b'<<: *row',
    b'!!binary x', b'!!set {a}', b'!!timestamp 2001-01-01', b'? [a]', b'- ', b': ', b'{', b'}', b'[' * 200, b'\t', b'"',
    b"'", b'|', b'>', b'%', b'@', b'`', b'---\n', b'...\n', b'!!int 0x', b'.nan', b'.inf', b'1e999', b'9' * 5000, b'null',
    b'~', b'yes', b'2001-99-99', b'0o7', b'1_0', b'1:2:3', b'\xff', b'\0', b'\x1b',
    b'[' + b', '.join(b'&l%d [%s]' % (i, b', '.join([b'*l%d' % (i - 1)] * 9) if i else b'1') for i in range(12)) + b']',
    b'0x' + b'f' * 4000,
    b'[&m0 {x: 1}, ' + b', '.join(b'&m%d {<<: [%s]}' % (i, b', '.join([b'*m%d' % (i - 1)] * 10)) for i in range(1, 9)) + b']',
    b'&b [&c [&d [1,1,1,1,1,1,1,1,1,1],*d,*d,*d,*d,*d,*d,*d,*d,*d],*c,*c,*c,*c,*c,*c,*c,*c,*c,*b]')


def suites(folder: Path, file: Path) -> Callable[[], object]:
    """Reads a suite file."""
    from replk_mm.bench.suites.definition import read_suite

    def one() -> None:
        suite = read_suite(file)
        [(row.measurements(), row.checkpoint_of(seed), repr(row)) for row, seed in suite.pairs()[:100]]

    file.write_bytes(_SUITE)
    one()
    return one


def suite_files() -> Build:
    """Spoiled suite files."""
    import yaml

    tree = yaml.safe_load(_SUITE)

    def build(choices: Choices) -> bytes:
        kind = choices.below(3)
        if kind == 0:
            return changed_bytes(_SUITE, choices)
        if kind == 1:
            try:
                return yaml.safe_dump(edited(tree, choices)).encode('utf-8', 'surrogatepass')
            except ValueError:  # an integer of more digits than Python writes
                return _SUITE
        found = _SUITE
        for _ in range(1 + choices.below(3)):
            at = choices.below(len(found))
            found = found[:at] + choices.pick(_YAML) + found[at + choices.below(2) * choices.below(20) :]
        return found

    return build


