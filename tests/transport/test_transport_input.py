"""What cannot be measured is refused in words: which argument, what was found, what to do."""

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_speedlimit.transport import wasserstein2_squared

NAMES = ["x", "y"]


def good() -> dict[str, Any]:
    return {"x": torch.arange(12.0).reshape(4, 3), "y": torch.ones(4, 3)}


def assert_refused(error: type[Exception], words: list[str], **given: Any) -> None:
    with pytest.raises(error) as caught:
        wasserstein2_squared(**(good() | given))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_what_is_good_is_not_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wasserstein2_squared(**good()).value > 0
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_refused(ValueError, [])


# ---- clouds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(name: str, bad: float) -> None:
    cloud = good()[name]
    cloud[2, 1] = bad
    words = [f"{name} must be finite", "NaN or inf", "drop the diverged particles"]
    assert_refused(ValueError, words, **{name: cloud})
    assert_refused(ValueError, words, **{name: cloud.double()})
    # also between other numbers of particles
    other = "y" if name == "x" else "x"
    assert_refused(ValueError, words, **{name: cloud, other: good()[other][:3]})


@pytest.mark.parametrize("name", NAMES)
def test_squares_beyond_float64(name: str) -> None:
    assert_refused(
        ValueError, [f"{name} must be finite", "scale both clouds down"], **{name: good()[name].double() * 1e200}
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(3), ["(particles, coordinates)", "(3,)", "unsqueeze(0)"]),
        (torch.zeros(4, 3, 2), ["(particles, coordinates)", "(4, 3, 2)", "flatten(1)"]),
        (torch.tensor(1.0), ["(particles, coordinates)", "()"]),
        (torch.zeros(0, 3), ["must not be empty", "(0, 3)"]),
        (torch.zeros(4, 0), ["must not be empty", "(4, 0)"]),
    ],
    ids=["1-D", "3-D", "0-D", "no particles", "no coordinates"],
)
def test_shapes(name: str, bad: Tensor, words: list[str]) -> None:
    assert_refused(ValueError, [name, *words], **{name: bad})


def test_other_numbers_of_coordinates() -> None:
    words = ["same number of coordinates", "(4, 3)", "(4, 2)", "transpose"]
    assert_refused(ValueError, words, y=torch.zeros(4, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "cure"),
    [
        (torch.int64, ".to(torch.float64)"),
        (torch.uint8, ".to(torch.float64)"),
        (torch.bool, ".to(torch.float64)"),
        (torch.complex64, "view_as_real"),
        (torch.complex128, "view_as_real"),
    ],
    ids=str,
)
def test_types(name: str, dtype: torch.dtype, cure: str) -> None:
    words = [f"{name} must be of a real floating type", str(dtype), cure]
    assert_refused(TypeError, words, **{name: torch.ones(4, 3).to(dtype)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse(name: str, layout: str) -> None:
    # torch says of its own CSR layout that it is in beta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = torch.eye(4, 3).to_sparse() if layout == "coo" else torch.eye(4, 3).to_sparse_csr()
    assert_refused(TypeError, [f"{name} must be dense", str(sparse.layout), "to_dense"], **{name: sparse})


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_beside_blocks(name: str) -> None:
    words = ["both be tensors or both be iterables", "(4, 3)", "list", "[x]"]
    assert_refused(TypeError, words, **{name: [good()[name]]})
    assert_refused(TypeError, ["both be tensors or both be iterables"], **{name: iter([good()[name]])})


@pytest.mark.parametrize("thing", [None, 3.0, len], ids=["None", "number", "function"])
def test_no_cloud_at_all(thing: Any) -> None:
    assert_refused(
        TypeError, ["x must be a tensor (N, D) or an iterable of blocks", type(thing).__name__], x=thing, y=thing
    )
    assert_refused(TypeError, ["both be tensors or both be iterables", type(thing).__name__], x=thing)


def test_numpy_arrays_are_told_what_they_are() -> None:
    # An array is an iterable of its rows: arrays too.
    array = torch.ones(4, 3).numpy()
    assert_refused(TypeError, ["x must give tensors", "ndarray"], x=array, y=array)


@pytest.mark.parametrize("blocks", [False, True])
def test_devices(blocks: bool) -> None:
    x, y = torch.ones(4, 3), torch.ones(4, 3, device="meta")
    given = {"x": [x], "y": [y]} if blocks else {"x": x, "y": y}
    assert_refused(ValueError, ["one device", "cpu", "meta", "y.to(x.device)"], **given)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights_x", "weights_y"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0.5, 0.5, 0.5, -0.5], ["not negative", "least -0.5"]),
        ([0.5, 0.5, math.nan, 0.0], ["finite", "nan"]),
        ([0.5, 0.5, math.inf, 0.0], ["finite", "inf"]),
        ([0.0, 0.0, 0.0, 0.0], ["not all zero"]),
    ],
    ids=["negative", "NaN", "inf", "zero"],
)
def test_weights(name: str, bad: list[float], words: list[str]) -> None:
    assert_refused(ValueError, [name, *words, "drop the particles"], **{name: torch.tensor(bad)})


@pytest.mark.parametrize("name", ["weights_x", "weights_y"])
@pytest.mark.parametrize(
    "bad", [torch.ones(3) / 3, torch.ones(4, 1) / 4, torch.tensor(1.0), [0.25] * 4, 0.25], ids=lambda bad: str(bad)[:12]
)
def test_weights_of_another_shape(name: str, bad: Any) -> None:
    got = str(tuple(bad.shape)) if isinstance(bad, Tensor) else type(bad).__name__
    assert_refused(ValueError, [name, "shape (4,)", "one weight per particle", got], **{name: bad})


@pytest.mark.parametrize("name", ["weights_x", "weights_y"])
def test_weights_that_do_not_sum_to_one_are_divided(name: str) -> None:
    shares = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = wasserstein2_squared(**good(), **{name: shares.double() / 10})
    with pytest.warns(UserWarning, match=f"{name} sums to 10, not 1: it was divided by its sum") as record:
        found = wasserstein2_squared(**good(), **{name: shares})
    assert len(record) == 1
    assert found.value == pytest.approx(expected.value, rel=1e-12)


@pytest.mark.parametrize("name", ["weights_x", "weights_y"])
def test_weights_that_sum_to_one_are_quiet(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wasserstein2_squared(**good(), **{name: torch.tensor([0.1, 0.2, 0.3, 0.4])})  # 1 + 6e-8 in float32
        wasserstein2_squared(**good(), **{name: torch.tensor([0.1, 0.2, 0.3, 0.4 + 1e-7], dtype=torch.float64)})


@pytest.mark.parametrize("name", ["weights_x", "weights_y"])
def test_whole_numbers_as_weights(name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} sums to 10"):
        found = wasserstein2_squared(**good(), **{name: torch.tensor([1, 2, 3, 4])})
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert found.value == pytest.approx(wasserstein2_squared(**good(), **{name: shares}).value, rel=1e-12)


# ---- tolerance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1e-3, math.nan, math.inf, -math.inf, None, "1e-3"], ids=repr)
def test_tolerances(bad: Any) -> None:
    assert_refused(ValueError, ["tolerance must be a positive number", repr(bad), "1e-3 is the default"], tolerance=bad)


@pytest.mark.parametrize("tolerance", [1, 1e-6, 5.0])
def test_tolerances_that_are_taken(tolerance: float) -> None:
    assert wasserstein2_squared(**good(), tolerance=tolerance).converged


# ---- half precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_warned_of_and_measured(name: str, dtype: torch.dtype) -> None:
    given = good() | {name: good()[name].to(dtype)}
    with pytest.warns(UserWarning, match=re.escape(f"{name} is {dtype}")) as record:
        found = wasserstein2_squared(**given)
    assert len(record) == 1
    assert "float32" in str(record[0].message)
    # These small integers are exact in half precision too.
    assert found.value == wasserstein2_squared(**good()).value


def test_half_precision_is_warned_of_once() -> None:
    halves = [cloud.half().split(1, 1) for cloud in good().values()]
    with pytest.warns(UserWarning, match="float16") as record:
        wasserstein2_squared(iter(halves[0]), iter(halves[1]))
    assert len(record) == 1
    with pytest.warns(UserWarning, match="float16") as record:
        wasserstein2_squared(list(halves[0]), list(halves[1]))
    assert len(record) == 1


@pytest.mark.parametrize("how", ["half precision", "weights"])
def test_warnings_point_at_the_caller(how: str) -> None:
    given: dict[str, Any] = {"x": good()["x"].half()} if how == "half precision" else {"weights_x": torch.ones(4)}
    with pytest.warns(UserWarning, match="float16|weights_x") as record:
        wasserstein2_squared(**(good() | given))
    assert record[0].filename == __file__


def test_mixed_precision_is_measured_in_float64() -> None:
    given = good()
    found = wasserstein2_squared(given["x"], given["y"].double())
    assert found == wasserstein2_squared(**given)


# ---- found by a reader -------------------------------------------------------------------------------------


def test_one_iterator_for_both() -> None:
    blocks = iter([torch.zeros(4, 3), torch.ones(4, 3)])
    with pytest.raises(ValueError, match=r"x and y must not be one iterator, .*; make two"):
        wasserstein2_squared(blocks, blocks)
    same = [torch.zeros(4, 3)]
    assert wasserstein2_squared(same, same).value == 0


def test_clouds_that_are_finite_and_too_far_apart() -> None:
    with pytest.raises(ValueError, match=r"^the distance of x and y must be finite"):
        wasserstein2_squared(torch.full((4, 3), 1e200, dtype=torch.float64), torch.zeros(4, 3))


@pytest.mark.parametrize("name", ["weights_x", "weights_y"])
def test_weights_that_are_no_real_tensors(name: str) -> None:
    assert_refused(ValueError, [name, "list", "torch.as_tensor"], **{name: [0.25] * 4})
    assert_refused(TypeError, [name, "complex64", ".abs()"], **{name: torch.full((4,), 0.25 + 1j)})


def test_a_tolerance_from_numpy() -> None:
    assert wasserstein2_squared(**good(), tolerance=np.float32(1e-3)).converged
