"""What every backbone promises. A family's test class inherits this and names its constructor and sizes."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from mmcv.cnn.bricks import DropPath
from norms import randomize_norms
from process_group import fully_shard, single_process_group
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BackboneContract:
    """Attributes that a family's test class sets."""

    cls: type[nn.Module]
    #: Arguments of a network that runs in milliseconds: four stages, all of them returned.
    tiny: dict
    channels: list[int]
    #: Height or width of the four feature maps for one of the image.
    sides: Callable[[int], list[int]]
    batch_norm: dict
    #: Pattern of the names of norms that are not `norm_cfg`.
    fixed_norms = r'(?!)'
    #: Start of the names of layers of the outputs, which stand beside the stages.
    output_layers: str | tuple[str, ...] = 'norm'
    #: Names of the parameters that `frozen_stages=n` fixes: n to prefixes.
    frozen: dict[int, tuple[str, ...]]
    #: drop_path_rate 0.3 in the tiny network: what each DropPath in order of execution has.
    drop_paths: list[float]
    bad: list[dict]
    #: Further arguments for which FSDP of the stages is tested.
    sharded: list[dict] = [{}, dict(with_cp=True)]
    #: Largest layer id plus one, and ids of some parameters of the tiny network.
    num_layers: int

    def build(self, seed: int = 0, **kwargs) -> nn.Module:
        """A tiny network with weights and statistics that are far from their start, in evaluation mode."""
        torch.manual_seed(seed)
        model = randomize_norms(self.cls(**{**self.tiny, **kwargs}), seed)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith('gamma') or name.endswith('beta'):
                    value.normal_(0.5, 0.1)
        return model.eval()

    def image(self, *shape: int) -> Tensor:
        return torch.randn(*(shape or (2, 3, 64, 64)), generator=torch.Generator().manual_seed(1))

    @staticmethod
    def assert_equal(found, expected, relative: float = 0.0) -> None:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            assert (a.double() - b.double()).abs().max() <= relative * b.double().abs().max()

    def run(self, model: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs, and gradients of a fixed weighted sum of them."""
        model.zero_grad()
        outs = model(x)
        sum((out.float() * torch.linspace(-1, 1, out[0].numel()).view(out[0].shape)).sum() for out in outs).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return [o.detach() for o in outs], grads

    # shapes

    @pytest.mark.parametrize('height, width', [(64, 64), (64, 96), (61, 37), (33, 70), (32, 32)])
    def test_shapes(self, height, width):
        outs = self.build()(self.image(1, 3, height, width))
        sides = type(self).sides
        expected = list(zip([1] * 4, self.channels, sides(height), sides(width), strict=True))
        assert [tuple(o.shape) for o in outs] == expected

    def test_out_indices_pick_stages(self):
        model, x = self.build(), self.image()
        everything = model(x)
        for indices, stages in (((1, 3), (1, 3)), ((0,), (0,)), (-1, (3,)), ([-2, 0], (0, 2)), (2, (2,))):
            part = self.build(out_indices=indices)
            part.load_state_dict({k: v for k, v in model.state_dict().items() if k in part.state_dict()})
            outs = part(x)
            self.assert_equal(outs, [everything[i] for i in stages])
            assert [info['num_chs'] for info in part.feature_info] == [out.shape[1] for out in outs]
            assert [64 // info['reduction'] for info in part.feature_info] == [out.shape[2] for out in outs]

    @pytest.mark.parametrize('with_cp', [False, True])
    def test_stages_are_called(self, with_cp):
        """Forward hooks on them run, as of Grad-CAM and of feature extractors that read ``feature_info``."""
        model = self.build(with_cp=with_cp)
        seen = {info['module']: [] for info in model.feature_info}
        for name, outputs in seen.items():
            model.get_submodule(name).register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[-1]))
        model(self.image().requires_grad_())
        for info in model.feature_info:
            (output,) = seen[info['module']]
            side = 64 // info['reduction']
            assert output.shape == (2, info['num_chs'], side, side) and output.requires_grad

    def test_a_hook_on_a_stage_changes_the_features(self):
        model, x = self.build(), self.image()
        before = model(x)
        model.get_submodule(model.feature_info[1]['module']).register_forward_hook(lambda *args: args[-1] * 2)
        after = model(x)
        assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, False, False, False]

    def stages(self, model) -> list[nn.Module]:
        """The modules that FSDP shards."""
        return model.stages

    @pytest.mark.parametrize('whole', [False, True])
    def test_fully_shard_of_the_stages(self, whole):
        for kwargs in self.sharded:
            model, x = self.build(**kwargs).train(), self.image()
            outs, grads = self.run(copy.deepcopy(model), x)
            with single_process_group():
                for stage in self.stages(model):
                    fully_shard(stage)
                found, found_grads = self.run(fully_shard(model) if whole else model, x)
                self.assert_equal(found, outs)
                assert found_grads.keys() == grads.keys()
                for name, grad in found_grads.items():
                    assert torch.equal(grad.full_tensor() if hasattr(grad, 'full_tensor') else grad, grads[name]), name

    # precision and layout

    def test_memory_layout_of_the_input_does_not_matter(self):
        model, x = self.build(), self.image(2, 3, 64, 48)
        expected = model(x)
        strided = torch.stack((x, x), -1).flatten(-2)[..., ::2]
        for other in (
            x.contiguous(memory_format=torch.channels_last),
            strided,
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            assert not other.is_contiguous()
            self.assert_equal(model(other), expected, 1e-5)

    def test_memory_format_of_the_features(self):
        kept, x = self.build(out_memory_format='preserve_format'), self.image()
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            features = self.build()(image)
            assert all(o.is_contiguous() for o in features)
            self.assert_equal(kept(image), features)
            assert all(o.is_contiguous(memory_format=torch.channels_last) for o in kept(image))

    def test_compiled_operators_read_the_features(self):
        """mmcv's read plain memory: of channels-last features RoIAlign would average other pixels."""
        ops = pytest.importorskip('mmcv.ops')
        x = self.build()(self.image())[0]
        found = ops.roi_align(x, torch.tensor([[1.0, 2, 4, 10, 8]]), (1, 1), 1.0, 4, 'avg', True)
        assert torch.allclose(found[0, :, 0, 0], x[1, :, 4:8, 2:10].mean((1, 2)), atol=1e-5)

    def test_samples_of_a_batch_are_independent(self):
        model, x = self.build(), self.image(3, 3, 64, 64)
        single = [torch.cat(outs) for outs in zip(*(model(x[i : i + 1]) for i in range(3)), strict=True)]
        self.assert_equal(single, model(x), 1e-5)

    def test_float64_agrees_with_float32(self):
        model, x = self.build(), self.image()
        double = copy.deepcopy(model).double()(x.double())
        assert all(o.dtype == torch.float64 for o in double)
        self.assert_equal(model(x), double, 1e-4)

    def test_bfloat16_autocast(self):
        model, x = self.build(), self.image()
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            self.assert_equal(model(x), expected, 0.1)
            outs, grads = self.run(model.train(), x)
        assert all(o.isfinite().all() for o in outs)
        assert set(grads) == {n for n, _ in model.named_parameters()}
        assert all(g.isfinite().all() for g in grads.values())

    # training

    def test_every_parameter_gets_a_gradient(self):
        model = self.build().train()
        _, grads = self.run(model, self.image())
        assert [n for n, _ in model.named_parameters() if n not in grads or not grads[n].abs().sum() > 0] == []

    def test_gradient_checkpointing_changes_nothing(self):
        kwargs = dict(norm_cfg=self.batch_norm, drop_path_rate=0.4)
        plain, saving = self.build(**kwargs).train(), self.build(with_cp=True, **kwargs).train()
        results = []
        for model in (plain, saving):
            torch.manual_seed(3)
            calls = []
            hooks = [
                m.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                for m in model.modules()
                if isinstance(m, nn.Conv2d)
            ]
            results.append(self.run(model, self.image(4, 3, 64, 64)))
            results[-1] += (len(calls),)
            [hook.remove() for hook in hooks]
        (outs, grads, once), (outs_cp, grads_cp, twice) = results
        assert twice > once, 'nothing was recomputed'
        self.assert_equal(outs_cp, outs, 1e-6)
        assert grads.keys() == grads_cp.keys()
        largest = max(g.abs().max() for g in grads.values())
        for name, grad in grads.items():
            assert (grads_cp[name] - grad).abs().max() <= 1e-5 * largest, name
        # Running statistics and their counters too: a batch counts once.
        own = saving.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.allclose(own[name], value, rtol=1e-5, atol=1e-6), name

    @pytest.mark.parametrize('stages', range(-1, 5))
    def test_frozen_stages(self, stages):
        if stages not in self.frozen:
            with pytest.raises(ValueError, match=f'frozen_stages={stages}'):
                self.build(frozen_stages=stages)
            return
        model = self.build(frozen_stages=stages, norm_cfg=self.batch_norm)
        for mode in (True, False, True):
            assert model.train(mode) is model
            fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
            assert fixed == {n for n, _ in model.named_parameters() if n.startswith(self.frozen[stages])}
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                assert module.training == (not f'{name}.'.startswith(self.frozen[stages])), name
        before = {k: v.clone() for k, v in model.state_dict().items()}
        if stages == 4 and len(fixed) == len(list(model.parameters())):
            assert not any(o.requires_grad for o in model(self.image()))
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            return
        _, grads = self.run(model, self.image())
        assert set(grads) == {n for n, _ in model.named_parameters()} - fixed
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert bool(changed) == any(isinstance(m, _BatchNorm) and m.training for m in model.modules())
        assert not {k for k in changed if k.startswith(self.frozen[stages])}

    def test_norm_eval(self):
        for norm_eval in (False, True):
            model = self.build(norm_eval=norm_eval, norm_cfg=self.batch_norm)
            assert model.train() is model and model.training
            norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
            assert norms and all(m.training != norm_eval for m in norms)
            before = {k: v.clone() for k, v in model.state_dict().items()}
            model(self.image())
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) == norm_eval
            model.eval()
            assert not any(m.training for m in norms)

    def test_drop_path(self):
        model = self.build(drop_path_rate=0.3)
        found = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
        assert found == pytest.approx(self.drop_paths)
        x = self.image()
        self.assert_equal(model(x), model(x))
        model.train()
        for m in model.modules():
            if isinstance(m, _BatchNorm):
                m.eval()  # so that only stochastic depth is left
        torch.manual_seed(0)
        first = model(x)
        torch.manual_seed(1)
        assert any(not torch.equal(a, b) for a, b in zip(first, model(x), strict=True))

    def test_drop_path_keeps_the_mean(self):
        """A sample loses the branch of a block, or has it divided by the probability to keep it."""
        model = self.build(drop_path_rate=0.2).double()
        blocks = [m for m in model.modules() if isinstance(getattr(m, 'drop_path', None), DropPath)][-2:]
        inputs: list[Tensor] = []
        hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
        with torch.no_grad():
            model(self.image().double())
            [hook.remove() for hook in hooks]
            for block, x in zip(blocks, inputs, strict=True):
                x = x[:1].repeat(500, 1, 1, 1)
                branch, keep = block(x) - x, 1 - block.drop_path.drop_prob
                block.drop_path.train()
                found = block(x) - x
                kept = found.flatten(1).any(1)
                torch.testing.assert_close(found[kept], branch[kept] / keep, rtol=1e-9, atol=1e-12)
                assert kept.double().mean() == pytest.approx(keep, abs=0.07)  # four standard deviations

    # arguments

    @pytest.mark.parametrize(
        'cfg, kind',
        [
            (dict(type='BN', eps=1e-3), nn.BatchNorm2d),
            (dict(type='SyncBN'), nn.SyncBatchNorm),
            (dict(type='GN', num_groups=2), nn.GroupNorm),
            (dict(type='LN2d', eps=1e-4), nn.LayerNorm),
        ],
        ids=str,
    )
    def test_norm_cfg_is_used_everywhere(self, cfg, kind):
        model = self.build(norm_cfg=cfg)
        default = self.build()
        norms, others = (
            [
                m
                for n, m in network.named_modules()
                if isinstance(m, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)) and not re.match(self.fixed_norms, n)
            ]
            for network in (model, default)
        )
        assert len(norms) == len(others) > 0
        for norm in norms:
            assert isinstance(norm, kind)
            assert norm.eps == cfg.get('eps', 1e-5)
        if cfg['type'] != 'SyncBN':  # needs several processes while training; evaluation is BatchNorm's
            assert all(o.isfinite().all() for o in model.train()(self.image()))

    def test_norm_cfg_requires_grad(self):
        model = self.build(norm_cfg=dict(self.batch_norm, requires_grad=False))
        fixed = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        assert fixed and not any(m.weight.requires_grad for m in fixed)

    def check_argument(self, argument: str, value) -> None:
        """Another value of an argument must be refused or change the structure, a mode, or an output."""
        model = self.build()
        try:
            other = self.build(**{argument: value})
        except ValueError as error:
            assert argument in str(error)
            return
        if repr(model) != repr(other) or model.state_dict().keys() != other.state_dict().keys():
            return
        changed = any(not torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
        modes = [m.training for m in model.train().modules()] != [m.training for m in other.train().modules()]
        frozen = [p.requires_grad for p in model.parameters()] != [p.requires_grad for p in other.parameters()]
        other.load_state_dict(model.state_dict())
        results = []
        for network in (model, other):
            torch.manual_seed(0)
            results.append([*network.eval()(self.image()), *network.train()(self.image())])
        outputs = len(results[0]) != len(results[1]) or not all(map(torch.equal, *results))
        assert changed or modes or frozen or outputs, f'{argument}={value} changes nothing'

    def test_bad_arguments_are_rejected(self):
        for kwargs in self.bad:
            name = next(iter(kwargs))
            with pytest.raises(ValueError, match=self.cls.__name__) as caught:
                self.cls(**{**self.tiny, **kwargs})
            shown = kwargs[name] if not isinstance(kwargs[name], dict) else ''
            assert str(shown) in str(caught.value), kwargs
        with pytest.raises(ValueError, match=next(iter(self.cls.arch_settings))) as caught:
            self.cls(arch='no-such')
        assert all(name in str(caught.value) for name in self.cls.arch_settings)

    # copies and exports

    def test_copies(self, tmp_path):
        model, x = self.build(), self.image()
        expected = model(x)
        other = self.build(seed=7)
        assert any(not torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
        other.load_state_dict(model.state_dict(), strict=True)
        torch.save(model, tmp_path / 'model.pth')
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            other,
            torch.load(tmp_path / 'model.pth', weights_only=False),
        ):
            self.assert_equal(twin(x), expected)

    def test_trace(self):
        model, x = self.build(), self.image()
        traced = torch.jit.trace(model, x)
        self.assert_equal(traced(x * 0.5), model(x * 0.5), 1e-5)

    def test_export(self):
        model, x = self.build(), self.image()
        exported = torch.export.export(model, (x,))
        self.assert_equal(exported.module()(x * 0.5), model(x * 0.5), 1e-5)

    def test_meta_device(self):
        with torch.device('meta'):
            outs = self.cls(**self.tiny)(torch.empty(1, 3, 64, 64))
        assert [o.shape[1] for o in outs] == self.channels

    # initialization and depth

    def test_initialization(self):
        model = self.cls(**self.tiny)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.init_weights()
        after = {k: v.clone() for k, v in model.state_dict().items()}
        changed = any(not torch.equal(v, before[k]) for k, v in after.items())
        assert changed == bool(model.init_cfg)  # without one it stays as torch made it
        model.init_weights()  # mmengine calls it for every parent
        assert all(torch.equal(v, after[k]) for k, v in model.state_dict().items())
        given = self.cls(**self.tiny, init_cfg=dict(type='Constant', layer='Conv2d', val=0.25))
        given.init_weights()
        convolutions = [m for m in given.modules() if isinstance(m, nn.Conv2d)]
        assert convolutions and all((m.weight == 0.25).all() for m in convolutions)

    def test_layer_depth(self):
        model = self.build()
        depths = {}
        for name, _ in model.named_parameters():
            depth, total = model.get_layer_depth(f'backbone.{name}', 'backbone.')
            assert total == self.num_layers and 0 <= depth < total, name
            assert model.get_layer_depth(name) == (depth, total)
            depths[name] = depth
        missing = set(range(self.num_layers - 1)) - set(depths.values())
        assert not missing, f'no parameter in layers {sorted(missing)}; _locate_parameter returns (0, None) for a stem'
        # What runs later is never shallower: order by the first use in a forward pass.
        order, names = [], {id(m): n for n, m in model.named_modules()}
        hooks = [
            m.register_forward_hook(lambda m, *_: order.append(names[id(m)]))
            for m in model.modules()
            if next(m.parameters(recurse=False), None) is not None
        ]
        model(self.image())
        [hook.remove() for hook in hooks]
        inner = [n for n in order if not n.startswith(self.output_layers)]
        walk = [depths[next(p for p in depths if p.rpartition('.')[0] == n)] for n in inner]
        assert len(walk) > 10 and walk == sorted(walk)
        for name in ('decode_head.conv_seg.weight', 'neck.x', 'rpn_head.y'):
            assert model.get_layer_depth(name, 'backbone.') == (self.num_layers - 1, self.num_layers)
