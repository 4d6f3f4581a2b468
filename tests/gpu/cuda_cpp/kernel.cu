// SPDX-License-Identifier: Apache-2.0
// silu(a) * b and its gradient: one pass over memory each, a block per row, 16 bytes per access where they align.

#include "kernel.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

template <typename T, int N>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <typename T, int N>
__device__ void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// What torch computes step by step is rounded to the tensor's type after each step; so it is here.
template <typename T>
__device__ float rounded(float value) {
  return static_cast<float>(static_cast<T>(value));
}

// Written as torch writes them, so that they round alike.
__device__ float sigmoid(float a) {
  return 1.0f / (1.0f + expf(-a));
}

__device__ float silu(float a) {
  return a / (1.0f + expf(-a));
}

template <typename T, int N>
__global__ void forward(const T* __restrict__ x, T* __restrict__ y, int64_t columns) {
  const T* a_row = x + blockIdx.x * 2 * columns;
  T* y_row = y + blockIdx.x * columns;
  for (int64_t column = threadIdx.x * N; column < columns; column += blockDim.x * N) {
    const auto a = load<T, N>(a_row + column), b = load<T, N>(a_row + columns + column);
    Pack<T, N> result;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gate = static_cast<float>(a.values[i]);
      result.values[i] = static_cast<T>(rounded<T>(silu(gate)) * static_cast<float>(b.values[i]));
    }
    store(y_row + column, result);
  }
}

template <typename T, int N>
__global__ void backward(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx, int64_t columns) {
  const T* dy_row = dy + blockIdx.x * columns;
  const T* a_row = x + blockIdx.x * 2 * columns;
  T* da_row = dx + blockIdx.x * 2 * columns;
  for (int64_t column = threadIdx.x * N; column < columns; column += blockDim.x * N) {
    const auto a = load<T, N>(a_row + column), b = load<T, N>(a_row + columns + column);
    const auto grad = load<T, N>(dy_row + column);
    Pack<T, N> da, db;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gate = static_cast<float>(a.values[i]), g = static_cast<float>(grad.values[i]);
      const float s = sigmoid(gate), through = rounded<T>(g * static_cast<float>(b.values[i]));
      da.values[i] = static_cast<T>(through * s * (1.0f + gate * (1.0f - s)));
      db.values[i] = static_cast<T>(g * rounded<T>(silu(gate)));
    }
    store(da_row + column, da);
    store(da_row + columns + column, db);
  }
}

bool aligned(int64_t columns, int pack, std::initializer_list<const void*> pointers) {
  return columns % pack == 0 && std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
           return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
         });
}

// A grid has at most this many blocks, and a block takes a row.
bool too_many(int64_t rows) {
  return rows > std::numeric_limits<int32_t>::max();
}

int threads(int64_t packs) {
  return static_cast<int>(std::min<int64_t>(512, (packs + 31) / 32 * 32));
}

template <typename T>
void launch(const void* x, void* y, int64_t rows, int64_t columns, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  const auto* in = static_cast<const T*>(x);
  auto* out = static_cast<T*>(y);
  if (aligned(columns, kPack, {x, y})) {
    forward<T, kPack><<<rows, threads(columns / kPack), 0, stream>>>(in, out, columns);
  } else {
    forward<T, 1><<<rows, threads(columns), 0, stream>>>(in, out, columns);
  }
}

template <typename T>
void launch_backward(
    const void* dy, const void* x, void* dx, int64_t rows, int64_t columns, cudaStream_t stream) {
  constexpr int kPack = 16 / sizeof(T);
  const auto* grad = static_cast<const T*>(dy);
  const auto* in = static_cast<const T*>(x);
  auto* out = static_cast<T*>(dx);
  if (aligned(columns, kPack, {dy, x, dx})) {
    backward<T, kPack><<<rows, threads(columns / kPack), 0, stream>>>(grad, in, out, columns);
  } else {
    backward<T, 1><<<rows, threads(columns), 0, stream>>>(grad, in, out, columns);
  }
}

}  // namespace

cudaError_t silu_and_mul(Type type, const void* x, void* y, int64_t rows, int64_t columns, cudaStream_t stream) {
  if (too_many(rows)) {
    return cudaErrorInvalidConfiguration;
  }
  switch (type) {
    case Type::kFloat:
      launch<float>(x, y, rows, columns, stream);
      break;
    case Type::kHalf:
      launch<__half>(x, y, rows, columns, stream);
      break;
    case Type::kBFloat16:
      launch<__nv_bfloat16>(x, y, rows, columns, stream);
      break;
  }
  return cudaGetLastError();
}

cudaError_t silu_and_mul_backward(
    Type type, const void* dy, const void* x, void* dx, int64_t rows, int64_t columns, cudaStream_t stream) {
  if (too_many(rows)) {
    return cudaErrorInvalidConfiguration;
  }
  switch (type) {
    case Type::kFloat:
      launch_backward<float>(dy, x, dx, rows, columns, stream);
      break;
    case Type::kHalf:
      launch_backward<__half>(dy, x, dx, rows, columns, stream);
      break;
    case Type::kBFloat16:
      launch_backward<__nv_bfloat16>(dy, x, dx, rows, columns, stream);
      break;
  }
  return cudaGetLastError();
}
