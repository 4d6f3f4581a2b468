// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

enum class Type { kFloat, kHalf, kBFloat16 };

// y = silu(a) * b for every row [a, b] of x; `columns` is the width of a, of b and of y. All rows are contiguous.
cudaError_t silu_and_mul(Type type, const void* x, void* y, int64_t rows, int64_t columns, cudaStream_t stream);

// dx = [da, db] from the gradient dy of y.
cudaError_t silu_and_mul_backward(
    Type type, const void* dy, const void* x, void* dx, int64_t rows, int64_t columns, cudaStream_t stream);
