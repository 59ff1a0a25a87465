"""Layers and steps of many small networks at once on a CPU, compiled by numba.

Batch normalization and ReLU take one pass over a feature's samples, while they are in the cache,
where torch takes eight, and a step of SGD one over the parameters. Arrays are (networks, features,
samples) or (networks, parameters), float32 or float64, changed in place; nothing is compiled at
import.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["backward", "forward", "rectify", "scale", "squares", "step"]

# Sums in any order, as whole vectors.
FAST = {"contract", "reassoc", "nsz"}


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def forward(x, weight, bias, running_mean, running_var, eps, momentum, relu, kept, inverse):
    """Normalize x by its samples, in place, then ReLU if wanted.

    ``kept`` becomes the normalized x, ``inverse`` 1 over its standard deviation; the running
    statistics are moved.
    """
    networks, features, B = x.shape
    number = x.dtype.type
    size, one, zero = number(B), number(1), number(0)
    for m in range(networks):
        for f in range(features):
            row, own = x[m, f], kept[m, f]
            total = zero
            for i in range(B):
                total += row[i]
            mean, squares = total / size, zero
            for i in range(B):
                own[i] = row[i] - mean
                squares += own[i] * own[i]
            scale = one / np.sqrt(squares / size + number(eps))
            inverse[m, f] = scale
            running_mean[m, f] += number(momentum) * (mean - running_mean[m, f])
            running_var[m, f] += number(momentum) * (squares / (size - one) - running_var[m, f])
            w, b = weight[m, f], bias[m, f]
            for i in range(B):
                own[i] *= scale
                row[i] = own[i] * w + b
            if relu:
                _rectify(row)


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def backward(slope, y, kept, weight, inverse, relu, of_weight, of_bias):
    """The gradient in the input over that in the output y, in place, and those in the weights."""
    networks, features, B = slope.shape
    number = slope.dtype.type
    size, zero = number(B), number(0)
    for m in range(networks):
        for f in range(features):
            g, own = slope[m, f], kept[m, f]
            if relu:
                _stop(g, y[m, f])
            shift, stretch = zero, zero
            for i in range(B):
                shift += g[i]
                stretch += g[i] * own[i]
            of_weight[m, f], of_bias[m, f] = stretch, shift
            # What a change of x does through the mean and the variance of the batch.
            factor, a, b = weight[m, f] * inverse[m, f], shift / size, stretch / size
            for i in range(B):
                g[i] = factor * (g[i] - a - own[i] * b)


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def scale(x, weight, bias, running_mean, running_var, eps, relu):
    """Normalize x by the running statistics, in place, then ReLU if wanted."""
    networks, features, B = x.shape
    for m in range(networks):
        for f in range(features):
            row = x[m, f]
            w = weight[m, f] / np.sqrt(running_var[m, f] + x.dtype.type(eps))
            b = bias[m, f] - running_mean[m, f] * w
            for i in range(B):
                row[i] = row[i] * w + b
            if relu:
                _rectify(row)


@njit(nogil=True, fastmath=FAST)
def squares(slope, out):
    """Add the sum of each network's squares to ``out`` (networks,)."""
    for m in range(slope.shape[0]):
        row, total = slope[m], slope.dtype.type(0)
        for i in range(len(row)):
            total += row[i] * row[i]
        out[m] += total


@njit(nogil=True)
def step(p, slope, velocity, scale, lr, momentum, weight_decay, nesterov):
    """SGD as torch has it, the gradient times ``scale`` (networks,) before."""
    number = p.dtype.type
    momentum, decay = number(momentum), number(weight_decay)
    for m in range(p.shape[0]):
        weights, slopes, own = p[m], slope[m], velocity[m]
        factor, rate = scale[m], lr[m]
        for i in range(len(weights)):
            g = slopes[i] * factor + decay * weights[i]
            own[i] = g + momentum * own[i]
            direction = g + momentum * own[i] if nesterov else own[i]
            weights[i] -= rate * direction


@njit(nogil=True)
def rectify(x):
    """ReLU, in place."""
    for m in range(x.shape[0]):
        for f in range(x.shape[1]):
            _rectify(x[m, f])


@njit(inline="always")
def _rectify(row):
    zero = row.dtype.type(0)
    for i in range(len(row)):
        row[i] = zero if row[i] < zero else row[i]  # NaN stays


@njit(inline="always")
def _stop(slope, y):
    zero = slope.dtype.type(0)
    for i in range(len(slope)):
        slope[i] = slope[i] if y[i] > zero else zero
