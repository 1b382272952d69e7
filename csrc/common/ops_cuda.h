// What the CUDA ops of all cores share: the device of a call, torch's stream, errors.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <stdexcept>

#include "cuda_launch.h"
#include "ops_common.h"

namespace alignops {

// torch's stream for a device. Its C function is looked up in the libtorch_cuda.so of the process,
// so that this library links and loads where torch has no CUDA.
inline cudaStream_t current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr
               ? nullptr
               : reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get == nullptr)
    throw std::runtime_error("alignops: this torch has no CUDA: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  if (get(device, &stream) != 0)
    throw std::runtime_error(message("alignops: no CUDA stream on device ", device));
  return static_cast<cudaStream_t>(stream);
}

// The device of a call, current in torch and in this library's CUDA runtime, and torch's stream.
class Gpu {
 public:
  Gpu(const Tensor& t, const char* op, const char* argument)
      : op_(op), device_(index(t, op, argument)), guard_(device_) {
    check(cudaSetDevice(device_), "cudaSetDevice");
    launch_.stream = current_stream(device_);
  }

  int32_t device() const { return device_; }
  cudaStream_t stream() const { return launch_.stream; }
  cuda::Launch& launch() { return launch_; }

  void check(cudaError_t error, const char* call) const {
    if (error != cudaSuccess)
      throw std::runtime_error(
          message(op_, ": ", call, " on cuda:", device_, ": ", cudaGetErrorString(error)));
  }
  void check_launch(cudaError_t error) const {
    if (error != cudaSuccess)
      throw std::runtime_error(message(op_, ": kernel ", launch_.kernel, " with grid ",
                                       launch_.grid, " on cuda:", device_, ": ",
                                       cudaGetErrorString(error)));
  }

 private:
  static int32_t index(const Tensor& t, const char* op, const char* argument) {
    ALIGNOPS_CHECK(t.is_cuda(), op, ": ", argument, " must be on a GPU, got another device");
    return t.get_device_index();
  }

  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Launch launch_{};
};

}  // namespace alignops
