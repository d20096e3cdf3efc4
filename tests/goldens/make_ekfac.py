"""Writes ekfac.npz: EK-FAC's matrices of a small network by curvlinops, in float64.

    python tests/goldens/make_ekfac.py

Needs torch and curvlinops-for-pytorch (made with 2.14.1 and 3.0.1), which the tests do not.
The network is a convolution, tanh, and a matrix product of all that comes out of it. The
file holds the inputs `x` [8, 4, 4, 2] and the parameters `conv/kernel`, `conv/bias` and
`out/kernel` in the layout of flax.linen; and for each of the two weights the matrix
`conv/matrix`, `out/matrix` [size, size] in that layout: the exact Gauss-Newton matrix of
the mean squared error, one pass for each entry of the output (`FisherType.TYPE2`), by
EK-FAC in the expand form.
"""

from pathlib import Path

import numpy as np
import torch
from curvlinops import EKFACLinearOperator, FisherType, KFACType

PATH = Path(__file__).with_name("ekfac.npz")
OUTPUTS = 32


def flax_matrix(matrix: np.ndarray, shape: tuple, axes: tuple) -> np.ndarray:
    """Returns a matrix of a weight of PyTorch, its axes in another order on both sides."""
    size, both = matrix.shape[0], (*axes, *(len(axes) + axis for axis in axes))
    return matrix.reshape(shape + shape).transpose(both).reshape(size, size)


def main() -> None:
    rng = np.random.default_rng(0)
    conv = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    out = torch.nn.Linear(12, OUTPUTS, bias=False).double()
    for parameter in (*conv.parameters(), *out.parameters()):
        values = rng.normal(size=parameter.shape).astype(np.float32) / 2
        parameter.data = torch.tensor(values, dtype=torch.float64)
    x = rng.normal(size=(8, 4, 4, 2)).astype(np.float32)
    inputs = torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
    model = torch.nn.Sequential(conv, torch.nn.Tanh(), torch.nn.Flatten(), out)
    # The target does not matter to the Gauss-Newton matrix.
    data = [(inputs[:5], torch.zeros(5, OUTPUTS).double())]
    data += [(inputs[5:], torch.zeros(3, OUTPUTS).double())]
    operator = EKFACLinearOperator(
        model,
        torch.nn.MSELoss(reduction="mean"),
        list(model.parameters()),
        data,
        fisher_type=FisherType.TYPE2,
        kfac_approx=KFACType.EXPAND,
        separate_weight_and_bias=True,
    )
    whole = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).numpy()
    size = conv.weight.numel()
    matrices = {
        "conv/matrix": flax_matrix(whole[:size, :size], (3, 2, 3, 3), (2, 3, 1, 0)),
        # PyTorch flattens channels first: columns are those of flax in another order.
        "out/matrix": flax_matrix(
            whole[-out.weight.numel() :, -out.weight.numel() :],
            (OUTPUTS, 3, 2, 2),
            (2, 3, 1, 0),
        ),
    }
    weights = {
        "conv/kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0),
        "conv/bias": conv.bias.detach().numpy(),
        "out/kernel": out.weight.detach()
        .numpy()
        .reshape(OUTPUTS, 3, 2, 2)
        .transpose(2, 3, 1, 0)
        .reshape(12, OUTPUTS),
    }
    parameters = {name: array.astype(np.float32) for name, array in weights.items()}
    np.savez_compressed(PATH, x=x, **parameters, **matrices)


if __name__ == "__main__":
    main()
