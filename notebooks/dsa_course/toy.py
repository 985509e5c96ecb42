"""The toy of notebooks 02 to 10: 8 tokens, 2 index heads, dim 4, all small whole numbers, so that a pencil can follow.

Worth knowing by heart: token 7 scores [7, 0, 1, -3, 0, 8, 0, 1]. With k = 3 it keeps tokens 0, 2 and 5: token 2 ties
with token 7 at score 1, and the smaller index wins. Token 5 is its favourite, with a score of 8.
"""

import types

import torch

K = 3  # the toy's k

Q_IDX = (  # a token a line, an index head a list
    ([-1, 2, 0, -1], [0, 2, 1, -1]),
    ([2, -2, -1, 0], [-1, -2, 1, 0]),
    ([1, -1, 0, -2], [-1, 2, 0, -1]),
    ([0, -1, 2, 1], [-2, 2, 0, 1]),
    ([2, 2, -1, -1], [1, 2, -1, 1]),
    ([-1, 0, 2, -2], [2, -2, -2, 1]),
    ([0, -2, 2, 1], [-2, -1, 2, 0]),
    ([-2, 2, -1, 2], [-1, 2, 2, 1]),
)
K_IDX = (
    [-2, 1, 1, 1],
    [2, -1, 2, -2],
    [-2, -2, 1, 2],
    [1, 1, -1, 2],
    [2, 1, 0, -2],
    [2, 2, 1, 0],
    [1, 0, 1, -2],
    [-2, -2, 1, 1],
)
W = ([2, 1], [2, -1], [1, 2], [-1, 2], [1, 2], [1, 2], [-1, 1], [-1, 2])

Q = (  # the attention's side: a token a line, a head a list
    ([2, 1, 1, 2], [0, 1, 2, -1]),
    ([-2, -1, -1, 2], [2, -2, 0, 2]),
    ([-2, 1, -2, 0], [2, -1, -1, -1]),
    ([1, -1, 2, 0], [1, 0, 0, 1]),
    ([0, 2, 2, 1], [1, 1, -1, 2]),
    ([0, -1, 2, -2], [2, 1, -2, -2]),
    ([0, -2, -2, 0], [2, 0, 2, 2]),
    ([2, 1, 0, 0], [-1, 0, -1, -1]),
)
KV = (
    [2, -2, -2, -2],
    [2, 1, 2, -1],
    [1, -1, 0, -2],
    [1, 2, 1, -2],
    [0, -1, 2, 2],
    [-2, 0, 2, 2],
    [1, 1, -2, 1],
    [0, -2, -1, 0],
)


def toy(device="cpu"):
    """The toy as fp32 tensors: q_idx [8, 2, 4], k_idx [8, 4], w [8, 2], q [8, 2, 4], kv [8, 4], and k = 3.

    v_dim is 2 and scale 0.5: the first two columns of kv are the value, and 0.5 is 4^-0.5.
    """
    tensors = {"q_idx": Q_IDX, "k_idx": K_IDX, "w": W, "q": Q, "kv": KV}
    tensors = {name: torch.tensor(rows, dtype=torch.float32, device=device) for name, rows in tensors.items()}
    return types.SimpleNamespace(**tensors, k=K, v_dim=2, scale=0.5)
