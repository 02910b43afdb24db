"""The empirical kernel against explicit Jacobians, and that the module is left as it was."""

import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from theory_cases import LargestTensor, draw
from torch import Tensor, nn

from lightning_speedlimit.theory import empirical_ntk
from lightning_speedlimit.theory.jacobian import Jacobian


def explicit(module: nn.Module, *inputs: Tensor) -> Tensor:
    """JJᵀ from one call of autograd per output, the whole batch at once, on the module's own parameters."""
    module.eval()
    outputs = module(*inputs).flatten()
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for output in outputs:
        gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        row = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        row = [g.to_dense() if g.is_sparse else g for g in row]
        rows.append(torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in row]))
    jacobian = torch.stack(rows).double()
    return jacobian @ jacobian.T


class Call(nn.Module):
    """A module whose forward is the given function of its parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 1))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def norms() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    for parameter in [*net[0].parameters(), net[2].bias]:
        parameter.requires_grad_(False)
    return net


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    return net


def batch_norm() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    net.double()(draw(9, 32, 4))  # running statistics that are not 0 and 1
    return net


def batch_statistics() -> nn.Module:
    """Samples that see each other in eval mode too."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 2))


def hidden_statistics() -> nn.Module:
    """As above, where a last layer of zeros makes the outputs, though not their gradients, blind to it."""
    statistics = nn.BatchNorm2d(3, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), statistics, nn.Tanh(), nn.Flatten(), nn.Linear(48, 2))
    nn.init.zeros_(net[4].weight)
    nn.init.zeros_(net[4].bias)
    return net


def all_zeros() -> nn.Module:
    net = nn.Linear(4, 2)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def centred_zeros() -> nn.Module:
    return Call(lambda self, x: self.net(x - x.mean(0)), net=all_zeros())


def frozen_zeros() -> nn.Module:
    """A head that stays 0: no gradient passes, so nothing can depend on anything."""
    net = hidden_statistics()
    net[4].requires_grad_(False)
    return net


def coupled_here_only() -> nn.Module:
    """Samples that see each other at these weights, and not beside them."""
    net = Call(lambda self, x: self.net(x - x.mean(0) * bool((self.net.weight == 1).all())), net=nn.Linear(4, 2))
    nn.init.ones_(net.net.weight)
    return net


def images_out() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))


def weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))


def recurrent() -> nn.Module:
    return Call(lambda self, x: self.lstm(x)[0][:, -1], lstm=nn.LSTM(4, 3, batch_first=True))


def squeezing() -> nn.Module:
    return Call(lambda self, x: self.net(x).squeeze(), net=mlp())


def unused() -> nn.Module:
    return Call(lambda self, x: self.net(x), net=mlp(), idle=nn.Linear(3, 3))


def branching() -> nn.Module:
    """Values decide what runs, sample by sample."""
    return Call(
        lambda self, x: torch.stack([self.a(row) if row.sum().item() > 0 else self.b(row) for row in x]),
        a=nn.Linear(4, 2),
        b=nn.Linear(4, 2),
    )


def passing_through() -> nn.Module:
    """Some samples meet no parameter."""
    return Call(lambda self, x: torch.stack([self.a(row) if row[0] > 0 else row[:2] for row in x]), a=nn.Linear(4, 2))


def fixed_batch() -> nn.Module:
    return Call(lambda self, x: self.net(x.reshape(6, 4)), net=mlp())


def pairs() -> nn.Module:
    """As many outputs per sample as there are samples, twice."""
    return Call(lambda self, x: torch.cdist(self.net(x), x).repeat(1, 2) + 1, net=nn.Linear(4, 4))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.complex(draw(0, 4, 2), draw(1, 4, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs().square()


FLAT, IMAGES, TOKENS = draw(0, 6, 4), draw(1, 5, 2, 6, 6), draw(2, 5, 3, 4)
CASES: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (mlp, FLAT),
    (cnn, IMAGES),
    (norms, FLAT),
    (attention, TOKENS),
    (frozen, FLAT),
    (tied, FLAT),
    (batch_norm, FLAT),
    (batch_statistics, FLAT),
    (hidden_statistics, IMAGES),
    (all_zeros, FLAT),
    (centred_zeros, FLAT),
    (coupled_here_only, FLAT),
    (images_out, FLAT),
    (weight_norm, FLAT),
    (recurrent, TOKENS),
    (squeezing, FLAT),
    (unused, FLAT),
    (branching, FLAT),
    (passing_through, FLAT),
    (fixed_batch, FLAT),
    (pairs, FLAT[:4]),
    (Complex, FLAT),
]


def assert_kernels_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """1e-10 of the largest entry: some hundred parameters' rounding of 1e-16, with room for other orders of sums."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    net = make()
    return net if isinstance(net, Complex) else net.double()


@pytest.mark.parametrize(("make", "inputs"), CASES, ids=[make.__name__ for make, _ in CASES])
@pytest.mark.parametrize("block_bytes", [1, 3000, 2**29])
def test_explicit_jacobians(make: Callable[[], nn.Module], inputs: Tensor, block_bytes: int) -> None:
    net = built(make)
    found = empirical_ntk(net.train(), inputs, block_bytes=block_bytes)
    assert_kernels_close(found, explicit(net, inputs))
    assert torch.equal(found, found.T)


def test_samples_are_evaluated_alone_where_they_can_be() -> None:
    """A row then costs one sample's gradient, not the batch's."""
    for make, inputs, alone in (
        (norms, FLAT, {1}),
        (all_zeros, FLAT, {1}),
        (frozen_zeros, IMAGES, {1}),
        (batch_statistics, FLAT, {len(FLAT)}),
    ):
        net, sizes = built(make), []
        net.register_forward_pre_hook(lambda _, x, sizes=sizes: sizes.append((len(x[0]), torch.is_grad_enabled())))
        empirical_ntk(net, inputs)
        assert {size for size, differentiated in sizes if differentiated} == alone


def test_blocks_are_as_large_as_asked() -> None:
    # J has 60 rows of 5,000 float64: 2.4 MB; K has 29 kB.
    net, inputs = nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 2).requires_grad_(False)), draw(0, 30, 4)
    with LargestTensor() as largest:
        empirical_ntk(net.double(), inputs, block_bytes=2**19)
    assert 2**18 < largest.bytes <= 2**19


def test_rows_held_and_rows_passing_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, rows = [], Jacobian.rows

    def noted(self: Jacobian, start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        return rows(self, start, stop)

    monkeypatch.setattr(Jacobian, "rows", noted)
    empirical_ntk(nn.Linear(4, 5).double(), draw(0, 8, 4), block_bytes=8 * 25 * 16)  # 16 of 40 rows of 25 parameters
    assert sizes[0] == 12  # held, while four at a time are computed for their products with these
    assert sizes[1:8] == [4] * 7
    assert sum(sizes[:8]) == 40


def test_hooks_on_parameters_are_left_alone() -> None:
    net = built(mlp)
    expected = empirical_ntk(net, FLAT)
    net[0].weight.register_hook(lambda gradient: 100 * gradient)
    assert torch.equal(empirical_ntk(net, FLAT), expected)


def test_several_inputs_of_other_types() -> None:
    net = Call(
        lambda self, tokens, x: self.head(self.words(tokens).mean(1) * x),
        words=nn.Embedding(10, 4, sparse=True),
        head=nn.Linear(4, 2),
    ).double()
    tokens, x = torch.arange(10).reshape(5, 2), draw(4, 5, 4)
    assert_kernels_close(empirical_ntk(net, (tokens, x)), explicit(net, tokens, x))


def test_by_hand() -> None:
    # f = w x + b with one output: K_ij = x_i · x_j + 1; with two outputs a Kronecker product, sample by sample.
    x = draw(0, 3, 4)
    torch.testing.assert_close(empirical_ntk(nn.Linear(4, 1).double(), x), x @ x.T + 1)
    expected = torch.kron(x @ x.T + 1, torch.eye(2, dtype=torch.float64))
    torch.testing.assert_close(empirical_ntk(nn.Linear(4, 2).double(), x), expected)


def test_single_precision_modules_give_float64_kernels() -> None:
    net = built(cnn)
    expected = explicit(net, IMAGES)
    # Jacobians rounded to 6e-8, some ten operations deep; the products are exact.
    assert_kernels_close(empirical_ntk(net.float(), IMAGES.float()), expected, 3e-6)


def test_nothing_of_the_module_changes() -> None:
    class Counting(nn.BatchNorm1d):
        """A buffer that counts calls, in eval mode too."""

        def forward(self, x: Tensor) -> Tensor:
            self.num_batches_tracked.add_(1)
            return super().forward(x)

    net = nn.Sequential(nn.Linear(4, 6), Counting(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    net[1].eval()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    identities = [id(parameter) for parameter in net.parameters()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    empirical_ntk(net, FLAT)
    assert [part.training for part in net.modules()] == [True, True, False, True, True]
    assert identities == [id(parameter) for parameter in net.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.is_leaf and bool((p.grad == 7).all()) for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_parameters_that_forward_rescales_are_left_alone() -> None:
    net = Call(lambda self, tokens: self.words(tokens).flatten(1), words=nn.Embedding(4, 2, max_norm=0.1)).double()
    before = net.words.weight.detach().clone()
    kernel = empirical_ntk(net, torch.arange(4))
    assert torch.equal(net.words.weight, before)
    assert torch.equal(kernel, torch.eye(8, dtype=torch.float64))


def test_modes_come_back_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    with pytest.raises(RuntimeError):
        empirical_ntk(net, FLAT)
    assert all(part.training for part in net.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.device("meta"),  # as the default device
    ],
)
def test_surrounding_modes_do_not_matter(context: Callable[[], object]) -> None:
    net = built(norms).float()
    expected = empirical_ntk(net, FLAT.float())
    with context():
        grad, inference, autocast = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
        found = empirical_ntk(net, FLAT.float())  # inputs made in inference mode, too
        assert torch.is_grad_enabled() == grad
        assert torch.is_inference_mode_enabled() == inference
        assert torch.is_autocast_enabled("cpu") == autocast
    assert torch.equal(found.clone(), expected)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    for make, inputs in ((mlp, FLAT), (attention, TOKENS), (recurrent, TOKENS), (batch_statistics, FLAT)):
        net = built(make)
        expected = explicit(net, inputs)
        found = empirical_ntk(net.cuda(), inputs.cuda())
        assert found.is_cuda
        assert_kernels_close(found.cpu(), expected)


@pytest.mark.slow
def test_four_thousand_outputs_fit_in_memory() -> None:
    """J would take 920 MiB; the process may add its blocks, 128 MiB, K of 122 MiB, and a temporary of that size."""
    script = """
        import resource, torch
        from torch import nn
        from lightning_speedlimit.theory import empirical_ntk
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        torch.set_num_threads(1)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 10))
        inputs = torch.randn(400, 64)
        empirical_ntk(net, inputs[:2])
        before = peak()
        kernel = empirical_ntk(net, inputs, block_bytes=2**27)
        added = peak() - before
        rows = []
        for n in (0, 123, 399):
            for output in net(inputs[n]):
                gradients = torch.autograd.grad(output, list(net.parameters()), retain_graph=True)
                rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        jacobian = torch.stack(rows).double()
        places = [10 * n + c for n in (0, 123, 399) for c in range(10)]
        error = (kernel[places][:, places] - jacobian @ jacobian.T).abs().max() / kernel.abs().max()
        print(added, error.item(), sum(p.numel() for p in net.parameters()) * 4000 * 8)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=900
    )
    added, error, whole = (float(x) for x in result.stdout.split())
    assert whole > 900 * 2**20
    assert added < 450 * 2**20, added / 2**20
    assert error < 1e-5  # single precision
