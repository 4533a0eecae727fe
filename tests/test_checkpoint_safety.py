"""Reading what strangers wrote: their code never runs, and what cannot be read is explained."""
import collections
import os
import pickle
import zipfile

import pytest
import torch
from checkpoint_cases import assert_same, first_line, tiny_backbone, write

from replk_mm.checkpoints import fetch, load_pretrained, read
from replk_mm.errors import UserError
from replk_mm.loading import load_model


class Exploit:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize('legacy', [False, True])
def test_malicious_pickle_is_refused_and_does_not_run(legacy, tmp_path):
    proof = tmp_path / 'proof'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {'w': torch.ones(2)}, 'x': Exploit(os.system, f'touch {proof}')}, path,
               _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError) as caught:
        read(path)
    assert not proof.exists()
    assert first_line(caught).startswith(f'{path}: refused') and 'system' in first_line(caught)
    assert '--trust-checkpoint' in str(caught.value)
    read(path, trust=True)
    assert proof.exists()  # the same file does run code for those who ask for it


@pytest.mark.parametrize('attribute', ['__init__', '__globals__', '__subclasses__', 'register_statistics'])
def test_getattr_of_the_allow_list_opens_nothing(attribute, tmp_path):
    from mmengine.logging import HistoryBuffer
    path = write(tmp_path / 'evil.pth', {'x': Exploit(getattr, HistoryBuffer, attribute)}
                 if attribute != '__globals__' else {'x': Exploit(getattr, HistoryBuffer.mean, '__globals__')})
    with pytest.raises(UserError) as caught:
        read(path)
    assert first_line(caught).startswith(f'{path}: refused') and attribute in first_line(caught)


def test_unknown_class_is_named(tmp_path):
    path = write(tmp_path / 'a.pth', {'x': collections.Counter(a=1), 'args': Exploit(zipfile.ZipInfo)})
    with pytest.raises(UserError) as caught:
        read(path)
    assert first_line(caught).startswith(f'{path}: refused') and 'zipfile.ZipInfo' in first_line(caught)
    assert 'torch' not in first_line(caught).split(': ', 1)[1]


def plain(path):
    torch.save({'state_dict': {'w': torch.randn(1000)}}, path)
    return path.read_bytes()


BROKEN = {
    'empty': lambda p: p.write_bytes(b''),
    'text': lambda p: p.write_text('<!DOCTYPE html><html>not found</html>\n'),
    'text that begins like a number': lambda p: p.write_text('404: Not Found'),
    'cut in half': lambda p: p.write_bytes(plain(p)[:2500]),
    'cut by a byte': lambda p: p.write_bytes(plain(p)[:-1]),
    'cut after its header': lambda p: p.write_bytes(plain(p)[:40]),
    'noise': lambda p: p.write_bytes(bytes((i * 97 + 13) % 256 for i in range(4000))),
    'zip of nonsense': lambda p: zipfile.ZipFile(p, 'w').writestr('readme.txt', 'hello'),
    'zip with a broken pickle': lambda p: zipfile.ZipFile(p, 'w').writestr('archive/data.pkl', b'\x80\x02}q\x00X'),
    'a bare pickle': lambda p: p.write_bytes(pickle.dumps({'a': 1}, 4)),
    'a cut pickle': lambda p: p.write_bytes(pickle.dumps({'a': list(range(100))}, 2)[:60]),
    'a cut legacy file': lambda p: (torch.save({'w': torch.ones(99)}, p, _use_new_zipfile_serialization=False),
                                    p.write_bytes(p.read_bytes()[:-50])),
    'a list': lambda p: torch.save([torch.ones(2)], p),
    'a tensor': lambda p: torch.save(torch.ones(2), p),
    'a folder': lambda p: p.mkdir(),
    'nothing there': lambda p: None,
}


@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize('kind', BROKEN)
def test_broken_files_are_explained(kind, trust, tmp_path):
    path = tmp_path / 'broken.pth'
    BROKEN[kind](path)
    if kind == 'a bare pickle' and trust:
        return  # torch reads what it calls its legacy format here
    with pytest.raises(UserError) as caught:
        read(path, trust)
    assert first_line(caught).startswith(f'{path}: ')
    assert {'a folder': 'folder', 'nothing there': 'no such', 'a list': 'list', 'a tensor': 'Tensor'}.get(
        kind, 'damaged') in first_line(caught)
    assert len(str(caught.value)) < 700 and 'Traceback' not in str(caught.value)


def test_noise_anywhere_is_a_user_error(tmp_path):
    """A file with some bytes changed either loads or is refused politely."""
    path = tmp_path / 'a.pth'
    good = plain(path)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(60):
        bad = bytearray(good)
        for at in torch.randint(len(bad), (8,), generator=generator).tolist():
            bad[at] ^= 255
        path.write_bytes(bad)
        try:
            read(path)
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize('content', [{}, {'epoch': 3}, {'state_dict': {}}, {'model': [1, 2]}, {'model': {'a': 'b'}}], ids=str)
def test_no_weights(content, tmp_path):
    path = write(tmp_path / 'a.pth', content)
    with pytest.raises(UserError, match='no weights in it') as caught:
        load_pretrained(tiny_backbone(), path)
    assert first_line(caught).startswith(path)


def test_checkpoint_of_mmengine_itself(tmp_path):
    """Written by a real Runner, with its log buffers, optimizer and scheduler."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Toy(BaseModel):
        def __init__(self):
            super().__init__()
            self.backbone = tiny_backbone()

        def forward(self, inputs, data_samples=None, mode='loss'):
            return dict(loss=sum(o.square().mean() for o in self.backbone(inputs)))

    runner = Runner(Toy(), str(tmp_path), train_dataloader=dict(
        batch_size=2, num_workers=0, dataset=[dict(inputs=torch.randn(3, 32, 32)) for _ in range(4)],
        sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        param_scheduler=dict(type='PolyLR', eta_min=0, power=.9, begin=0, end=4, by_epoch=False),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)), experiment_name='toy')
    runner.train()
    path = tmp_path / 'epoch_1.pth'
    loaded = read(path)
    buffers = loaded['message_hub']['log_scalars']
    assert buffers['train/loss'].data[0].shape == (2,) and buffers['train/loss'].mean() > 0
    assert loaded['optimizer']['state'] and loaded['param_schedulers'] and loaded['meta']['epoch'] == 1
    model = tiny_backbone(5)
    load_pretrained(model, path)
    assert_same(model, runner.model.backbone.state_dict())
    resumed = Toy()  # mmengine's own loading works too, which it does not by itself
    from mmengine.runner import load_checkpoint
    load_checkpoint(resumed, str(path), strict=True)
    assert_same(resumed, runner.model.state_dict())


def test_trust_is_passed_on(tmp_path):
    ran = tmp_path / 'ran'
    path = write(tmp_path / 'a.pth', {'state_dict': tiny_backbone().state_dict(), 'x': Exploit(os.mkdir, str(ran))})
    with pytest.raises(UserError, match='refused'):
        load_model(tiny_backbone(2), path)
    assert not ran.exists()
    load_model(tiny_backbone(2), path, trust=True)
    assert ran.exists()


@pytest.mark.parametrize('name', [
    'http://127.0.0.1:abc/x.pth', 'http://[::1/x.pth', 'http://127.0.0.1:9/x.pth', 'http:///x.pth',
    'http://127.0.0.1:9/a b.pth', f'http://127.0.0.1:9/{"x" * 300}.pth', 'x\0y', 'x' * 5000])
def test_what_is_no_address_and_no_path(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(UserError) as caught:
        read(name)
    said = 'could not be downloaded' if name.startswith('http') else 'no such checkpoint'
    assert said in first_line(caught) and first_line(caught).startswith(ascii(name[:100])[1:-1])
    assert len(str(caught.value)) < 700


def test_a_file_that_is_there_already_is_said(tmp_path, monkeypatch):
    """Two addresses that end alike have one place in the cache."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda address, path, progress: torch.save({}, path))
    said = []
    monkeypatch.setattr('replk_mm.checkpoints.print_log', lambda text, logger: said.append(text))
    assert fetch('http://one/latest.pth') == fetch('http://two/other/latest.pth') == tmp_path / 'checkpoints' / 'latest.pth'
    assert said == ['downloading http://one/latest.pth', 'http://two/other/latest.pth: not downloaded; a file of that name '
                    f'is there already: {tmp_path}/checkpoints/latest.pth']
