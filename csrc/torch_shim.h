// Tensors through libtorch's C interface (aoti_torch_*, which keeps its functions from version to
// version), in the libtorch that the process has loaded. Nothing is built or linked against it, so
// one build serves every torch version. Calls expect the dispatcher's keys above the kernels to be
// excluded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#define GKT_HAS_DLSYM 1
#endif

namespace gkt {

// Torch can't do what was asked, or failed at it; it keeps its message to itself.
struct TorchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using TensorHandle = struct AtenTensorOpaque*;

// Functions of one loaded libtorch; all but those of devices that it doesn't have.
struct TorchFunctions {
  using Convolution = int32_t (*)(TensorHandle, TensorHandle, TensorHandle* bias, const int64_t*,
                                  int64_t, const int64_t*, int64_t, const int64_t*, int64_t,
                                  int32_t transposed, const int64_t*, int64_t, int64_t groups,
                                  TensorHandle*);
  using ConvolutionBackward = int32_t (*)(TensorHandle, TensorHandle, TensorHandle,
                                          const int64_t** bias_sizes, int64_t, const int64_t*,
                                          int64_t, const int64_t*, int64_t, const int64_t*, int64_t,
                                          int32_t transposed, const int64_t*, int64_t,
                                          int64_t groups, const int32_t* mask, int64_t,
                                          TensorHandle*, TensorHandle*, TensorHandle*);

  int32_t (*delete_tensor)(TensorHandle);
  int32_t (*data_ptr)(TensorHandle, void**);
  int32_t (*dim)(TensorHandle, int64_t*);
  int32_t (*sizes)(TensorHandle, int64_t**);
  int32_t (*strides)(TensorHandle, int64_t**);
  int32_t (*dtype)(TensorHandle, int32_t*);
  int32_t (*device_type)(TensorHandle, int32_t*);
  int32_t (*device_index)(TensorHandle, int32_t*);
  int32_t (*empty_strided)(int64_t, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, TensorHandle*);
  int32_t (*copy)(TensorHandle self, TensorHandle source, int32_t non_blocking);
  Convolution convolution_cpu, convolution_cuda;
  ConvolutionBackward convolution_backward_cpu, convolution_backward_cuda;
  int32_t float32, float64, bfloat16, float16, uint8, int64, cpu, cuda;
};

// The functions, once `load_torch` has found them.
inline TorchFunctions& torch_functions() {
  static TorchFunctions functions{};
  return functions;
}

// Finds the functions in these libraries, which the process has loaded. The name of one that isn't
// there, or null. cuda: null where torch has no such library.
inline const char* load_torch(const char* cpu, const char* cuda) {
#ifdef GKT_HAS_DLSYM
  void* const library = dlopen(cpu, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return cpu;
  void* const cuda_library = cuda == nullptr ? nullptr : dlopen(cuda, RTLD_LAZY | RTLD_NOLOAD);
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    void* const found = dlsym(library, name);
    if (found == nullptr) missing = name;
    function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
  };
  const auto value = [&](int32_t& number, const char* name) {
    int32_t (*function)() = nullptr;
    find(function, name);
    if (function != nullptr) number = function();
  };
  TorchFunctions torch{};
  find(torch.delete_tensor, "aoti_torch_delete_tensor_object");
  find(torch.data_ptr, "aoti_torch_get_data_ptr");
  find(torch.dim, "aoti_torch_get_dim");
  find(torch.sizes, "aoti_torch_get_sizes");
  find(torch.strides, "aoti_torch_get_strides");
  find(torch.dtype, "aoti_torch_get_dtype");
  find(torch.device_type, "aoti_torch_get_device_type");
  find(torch.device_index, "aoti_torch_get_device_index");
  find(torch.empty_strided, "aoti_torch_empty_strided");
  find(torch.copy, "aoti_torch_copy_");
  find(torch.convolution_cpu, "aoti_torch_cpu_convolution");
  find(torch.convolution_backward_cpu, "aoti_torch_cpu_convolution_backward");
  value(torch.float32, "aoti_torch_dtype_float32");
  value(torch.float64, "aoti_torch_dtype_float64");
  value(torch.bfloat16, "aoti_torch_dtype_bfloat16");
  value(torch.float16, "aoti_torch_dtype_float16");
  value(torch.uint8, "aoti_torch_dtype_uint8");
  value(torch.int64, "aoti_torch_dtype_int64");
  value(torch.cpu, "aoti_torch_device_type_cpu");
  value(torch.cuda, "aoti_torch_device_type_cuda");
  if (cuda_library != nullptr) {
    torch.convolution_cuda = reinterpret_cast<TorchFunctions::Convolution>(
        dlsym(cuda_library, "aoti_torch_cuda_convolution"));
    torch.convolution_backward_cuda = reinterpret_cast<TorchFunctions::ConvolutionBackward>(
        dlsym(cuda_library, "aoti_torch_cuda_convolution_backward"));
  }
  if (missing == nullptr) torch_functions() = torch;
  return missing;
#else
  return "dlsym";
#endif
}

inline void check_torch(int32_t status, const char* what) {
  if (status != 0) throw TorchError(what);
}

// A tensor with what is often asked of it. It owns its handle; none: undefined.
class Tensor {
 public:
  Tensor() = default;
  // Delegates, so that the handle is deleted where torch can't say what is asked.
  explicit Tensor(TensorHandle handle) : Tensor() {
    if (handle == nullptr) return;
    handle_ = handle;
    const TorchFunctions& torch = torch_functions();
    check_torch(torch.data_ptr(handle, &data_), "data_ptr");
    check_torch(torch.dim(handle, &dim_), "dim");
    check_torch(torch.sizes(handle, &sizes_), "sizes");
    check_torch(torch.strides(handle, &strides_), "strides");
    check_torch(torch.dtype(handle, &dtype_), "dtype");
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    data_ = other.data_;
    dim_ = other.dim_;
    sizes_ = other.sizes_;
    strides_ = other.strides_;
    dtype_ = other.dtype_;
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) torch_functions().delete_tensor(handle_);
  }

  explicit operator bool() const { return handle_ != nullptr; }
  TensorHandle handle() const { return handle_; }
  TensorHandle release() { return std::exchange(handle_, nullptr); }
  void* data() const { return handle_ == nullptr ? nullptr : data_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }
  int64_t stride(int64_t d) const { return strides_[d]; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int32_t dtype() const { return dtype_; }

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim_; ++d) product *= sizes_[d];
    return product;
  }

  // Whether its values lie one after another in the order of these dimensions.
  bool is_dense(std::initializer_list<int64_t> order) const {
    int64_t expected = 1;
    for (auto d = std::rbegin(order); d != std::rend(order); ++d) {
      if (sizes_[*d] != 1 && strides_[*d] != expected) return false;
      expected *= sizes_[*d];
    }
    return true;
  }

 private:
  TensorHandle handle_ = nullptr;
  void* data_ = nullptr;
  int64_t dim_ = 0;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0;
};

// Where tensors are made.
struct Device {
  int32_t type, index;
};

inline Device device_of(const Tensor& tensor) {
  Device device{};
  check_torch(torch_functions().device_type(tensor.handle(), &device.type), "device_type");
  check_torch(torch_functions().device_index(tensor.handle(), &device.index), "device_index");
  return device;
}

inline Tensor empty(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                    Device device) {
  TensorHandle handle = nullptr;
  check_torch(torch_functions().empty_strided(dim, sizes, strides, dtype, device.type, device.index,
                                              &handle),
              "empty_strided");
  return Tensor(handle);
}

inline Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype, Device device) {
  std::vector<int64_t> strides(sizes.size());
  int64_t following = 1;
  for (size_t d = sizes.size(); d-- > 0; following *= sizes[d]) strides[d] = following;
  return empty(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device);
}

// With the sizes and strides of another, which is dense.
inline Tensor empty_like(const Tensor& tensor, int32_t dtype, Device device) {
  return empty(tensor.dim(), tensor.sizes(), tensor.strides(), dtype, device);
}

inline void copy(const Tensor& target, const Tensor& source) {
  check_torch(torch_functions().copy(target.handle(), source.handle(), 0), "copy_");
}

}  // namespace gkt
