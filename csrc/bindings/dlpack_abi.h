// The part of the DLPack C ABI (major version 1) that this module reads: a tensor's description, and the
// table of functions behind the capsule `type(tensor).__dlpack_c_exchange_api__`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace loopmdm::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous before version 1.2
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

// Slots that are not called here are declared as plain function pointers.
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  void (*allocate)();
  void (*owned_from_object)();
  void (*owned_to_object)();
  int (*view_of_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set; may be null
  void (*current_stream)();
};

static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, dtype) == 20 && offsetof(Tensor, shape) == 24);
static_assert(offsetof(ExchangeApi, view_of_object) == 16 + 3 * sizeof(void*));

}  // namespace loopmdm::dlpack
