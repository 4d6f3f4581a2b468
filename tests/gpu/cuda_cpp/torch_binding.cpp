// SPDX-License-Identifier: Apache-2.0
// The operators, on torch's stable ABI alone: built once, this runs with that torch and every later one.

#include <Python.h>

#include <cstdint>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernel.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "silu_and_mul takes float32, float16 and bfloat16, not other types");
  }
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

std::vector<int64_t> shape_of_half(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) % 2 == 0, "silu_and_mul takes an even last dimension");
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() /= 2;
  return shape;
}

Tensor forward(const Tensor& x) {
  const auto shape = shape_of_half(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const Tensor in = torch::stable::contiguous(x);
  const Tensor y = torch::stable::new_empty(in, {shape.data(), shape.size()});
  if (y.numel() > 0) {
    const int64_t columns = shape.back();
    STD_CUDA_CHECK(silu_and_mul(
        type_of(in), in.const_data_ptr(), y.mutable_data_ptr(), y.numel() / columns, columns,
        current_stream(in.get_device())));
  }
  return y;
}

Tensor backward(const Tensor& dy, const Tensor& x) {
  const int64_t columns = shape_of_half(x).back();
  STD_TORCH_CHECK(
      dy.numel() * 2 == x.numel() && dy.scalar_type() == x.scalar_type() && dy.get_device() == x.get_device(),
      "silu_and_mul_backward takes a gradient of the output's size, type and device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const Tensor grad = torch::stable::contiguous(dy), in = torch::stable::contiguous(x);
  const Tensor dx = torch::stable::empty_like(in);
  if (dx.numel() > 0) {
    STD_CUDA_CHECK(silu_and_mul_backward(
        type_of(in), grad.const_data_ptr(), in.const_data_ptr(), dx.mutable_data_ptr(), grad.numel() / columns,
        columns, current_stream(in.get_device())));
  }
  return dx;
}

}  // namespace

// The name of this build, given by the compiler's command line, is expanded before it is pasted.
#define DEFINE_OPERATORS(NAME, LIBRARY) STABLE_TORCH_LIBRARY(NAME, LIBRARY)
#define IMPLEMENT_OPERATORS(NAME, LIBRARY) STABLE_TORCH_LIBRARY_IMPL(NAME, CUDA, LIBRARY)
#define NAME_OF_INIT(NAME) PyInit_##NAME
#define DEFINE_INIT(NAME) PyMODINIT_FUNC NAME_OF_INIT(NAME)(void)

DEFINE_OPERATORS(KERNEL_NAME, library) {
  library.def("silu_and_mul(Tensor x) -> Tensor");
  library.def("silu_and_mul_backward(Tensor dy, Tensor x) -> Tensor");
}

IMPLEMENT_OPERATORS(KERNEL_NAME, library) {
  library.impl("silu_and_mul", TORCH_BOX(&forward));
  library.impl("silu_and_mul_backward", TORCH_BOX(&backward));
}

// An empty module: importing it loads this library, and that registers the operators.
DEFINE_INIT(KERNEL_NAME) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "operators", nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
