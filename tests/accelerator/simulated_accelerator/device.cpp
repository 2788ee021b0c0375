// An accelerator that is not there: four devices whose memory is host memory, in torch's PrivateUse1 slot.
//
// Every operator that the device has no code for runs on the CPU by torch's own fallback, so the numbers are right. What
// is simulated is all that surrounds them: tensors of different devices do not mix, the allocator, `.to(device)`, a
// backward thread for each device, streams and events, and a count of kernel launches, copies and reads by the host.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "counting.hpp"
#include "streams.hpp"

namespace simulated {

// ---- memory

struct HostMemory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    checker.allocated(current_device, data);
    return {data, data, &release, at::Device(kType, current_device)};
  }
  static void release(void* data) {
    checker.freed(data);  // first: another thread may get the same block at once
    std::free(data);
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
HostMemory memory;
REGISTER_ALLOCATOR(kType, &memory);

const void* data_of(const at::Tensor& t) { return t.storage().data(); }

// ---- devices, streams and events

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr at::DeviceType static_type = kType;
  at::DeviceType type() const override { return kType; }
  at::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  at::Device getDevice() const override { return at::Device(kType, current_device); }
  void uncheckedSetDevice(at::Device to) const noexcept override { current_device = to.index(); }
  void setDevice(at::Device to) const override { exchangeDevice(to); }
  at::Device exchangeDevice(at::Device to) const override {
    TORCH_CHECK(to.index() >= 0 && to.index() < kDevices, "expected one of ", kDevices, " devices, got ", to);
    return at::Device(kType, std::exchange(current_device, to.index()));
  }

  at::Stream getStream(at::Device d) const override { return stream_of(d.has_index() ? d.index() : current_device); }
  at::Stream getDefaultStream(at::Device d) const override { return at::Stream(at::Stream::DEFAULT, d); }
  at::Stream getStreamFromGlobalPool(at::Device d, bool) const override { return getNewStream(d, 0); }
  at::Stream getNewStream(at::Device d, int) const override {
    auto device = at::Device(kType, d.has_index() ? d.index() : current_device);
    return at::Stream(at::Stream::UNSAFE, device, checker.new_stream());
  }
  at::Stream exchangeStream(at::Stream s) const override {
    auto before = stream_of(s.device_index());
    current_streams.at(s.device_index()) = s.id();
    return before;
  }
  void* getStreamNativeHandle(const at::Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  bool queryStream(const at::Stream&) const override { return true; }
  void synchronizeStream(const at::Stream& s) const override {
    counter.add(kWait);
    checker.host_waits_for_stream(s);
  }
  void synchronizeDevice(const at::DeviceIndex device) const override {
    counter.add(kWait);
    checker.host_waits_for_device(device);
  }

  // An event is the clock of the stream on which it was recorded.
  void record(void** event, const at::Stream& s, const at::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Clock();
    *static_cast<Clock*>(*event) = checker.recorded(s);
  }
  void block(void* event, const at::Stream& s) const override {
    if (event != nullptr) checker.wait(s, *static_cast<Clock*>(event));
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void* event) const override {
    counter.add(kWait);
    if (event != nullptr) checker.host_waits(*static_cast<Clock*>(event));
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const at::Stream& s) const override {
    checker.record(data.get(), s);
  }
  void destroyEvent(void* event, const at::DeviceIndex) const noexcept override { delete static_cast<Clock*>(event); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex to) const override { exchangeDevice(to); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex to) const override { return exchangeDevice(to); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex to) const override {
    return Guard().exchangeDevice(at::Device(kType, to)).index();
  }
  // Random numbers come from the CPU's generator, for the operators run there.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    auto data = memory.allocate(bytes);
    if (storage.data()) std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---- the few operators that have to be the device's own: allocations and views, which launch nothing

at::Device resolved(std::optional<at::Device> device) {
  return device && device->has_index() ? *device : at::Device(kType, current_device);
}

const auto kKeys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(resolved(device));
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(resolved(device));
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto at_offset = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at_offset);
}

at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor& set_storage(at::Tensor& t, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(t, std::move(source), offset.guard_int(__FILE__, __LINE__),
                                      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

void record_stream(at::Tensor& t, c10::Stream stream) { checker.record(data_of(t), stream); }

// ---- copies, and reads by the host

at::Tensor on_host(const at::Tensor& t) {  // the same memory as a CPU tensor
  if (t.is_cpu()) return t;
  auto numel = static_cast<int64_t>(t.storage().nbytes() / t.itemsize());
  return at::from_blob(const_cast<void*>(data_of(t)), {numel}, at::TensorOptions().dtype(t.dtype()))
      .as_strided(t.sizes(), t.strides(), t.storage_offset());
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.is_cpu()) {
    counter.add("copy from host");
    checker.launch("copy from host", to.device().index(), {}, {data_of(to)});
    if (!non_blocking) {  // as on CUDA, where the host waits until the memory can be changed
      counter.add(kWait);
      if (!quiet) checker.host_waits_for_stream(stream_of(to.device().index()));
    }
  } else if (to.is_cpu()) {
    counter.add("copy to host");
    counter.add(kRead);
    checker.launch("copy to host", from.device().index(), {data_of(from)}, {});
    if (!quiet) checker.host_waits_for_stream(stream_of(from.device().index()));
  } else if (from.device() == to.device()) {
    counter.add("copy on the device");
    checker.launch("copy on the device", to.device().index(), {data_of(from)}, {data_of(to)});
  } else {
    counter.add("copy between devices");
    checker.copy_between_devices(from.device().index(), data_of(from), to.device().index(), data_of(to));
  }
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& t) {
  counter.add(kRead);
  checker.launch("_local_scalar_dense", t.device().index(), {data_of(t)}, {});
  if (!quiet) checker.host_waits_for_stream(stream_of(t.device().index()));
  return on_host(t).item();
}

// ---- all the others

// Their results have a size, or a value, that only the device knows.
const std::set<std::string> kHostWaitsFor = {"nonzero", "equal", "masked_select", "_unique2", "unique_dim",
                                             "unique_consecutive", "repeat_interleave", "bincount"};

// Operators that take indices from the host as well.
const std::set<std::string> kHostIndices = {"index", "_index_put_impl_", "index_put", "_unsafe_index"};

struct Uses {  // of one operator
  std::string name;
  int device = -1;
  bool from_host = false;
  Pointers reads, writes;

  void add(const at::Tensor& t, bool written) {
    if (!t.defined()) return;
    if (t.is_cpu()) {
      from_host |= t.dim() > 0;
      return;
    }
    TORCH_CHECK(device < 0 || device == t.device().index(), "expected all tensors on the same device, got sim:", device,
                " and sim:", static_cast<int>(t.device().index()), " in ", name);
    device = t.device().index();
    (written ? writes : reads).push_back(data_of(t));
  }
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Uses uses{schema.name().substr(schema.name().find("::") + 2)};
  auto values = torch::jit::last(*stack, schema.arguments().size());
  for (size_t i = 0; i < values.size(); ++i) {
    auto alias = schema.arguments()[i].alias_info();
    bool written = alias != nullptr && alias->isWrite();
    if (values[i].isTensor()) uses.add(values[i].toTensor(), written);
    if (values[i].isTensorList())
      for (const at::Tensor& t : values[i].toTensorVector()) uses.add(t, written);
    if (values[i].isList())  // of optional tensors
      for (const c10::IValue& each : values[i].toListRef())
        if (each.isTensor() && !values[i].isTensorList()) uses.add(each.toTensor(), written);
  }
  TORCH_CHECK(!uses.from_host || uses.device < 0 || kHostIndices.count(uses.name),
              "expected all tensors on the same device, got sim:", uses.device, " and cpu in ", uses.name);
  counter.add(uses.name);
  if (uses.device >= 0) checker.launch(uses.name, uses.device, uses.reads, uses.writes);
  if (kHostWaitsFor.count(uses.name) && uses.device >= 0) {
    counter.add(kRead);
    if (!quiet) checker.host_waits_for_stream(stream_of(uses.device));
  }
  {
    Quiet inside;
    at::native::cpu_fallback(op, stack);
  }
  auto created = [&](const at::Tensor& t) {
    if (!t.defined() || t.is_cpu()) return;
    auto data = data_of(t);
    for (const auto* known : {&uses.reads, &uses.writes})
      if (std::find(known->begin(), known->end(), data) != known->end()) return;
    checker.created(uses.name, t.device().index(), data);
  };
  for (const auto& value : torch::jit::last(*stack, schema.returns().size())) {
    if (value.isTensor()) created(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& t : value.toTensorVector()) created(t);
  }
}

}  // namespace simulated

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &simulated::empty);
  m.impl("empty_strided", &simulated::empty_strided);
  m.impl("as_strided", &simulated::as_strided);
  m.impl("view", &simulated::view);
  m.impl("_reshape_alias", &simulated::reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("resize_", &simulated::resize);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", &at::native::set_);
  m.impl("set_.source_Storage_storage_offset", &simulated::set_storage);
  m.impl("record_stream", &simulated::record_stream);
  m.impl("_copy_from", &simulated::copy_from);
  m.impl("_copy_from_and_resize", &simulated::copy_from_and_resize);
  m.impl("_local_scalar_dense", &simulated::item);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::on_cpu>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using simulated::checker;
  using simulated::counter;
  at::RegisterPrivateUse1HooksInterface(new simulated::Hooks());
  m.attr("device_count") = simulated::kDevices;
  m.def("start_counting", [] { counter.start(); });
  m.def("stop_counting", [] { return counter.stop(); });
  m.def("count", [](const std::string& name) { counter.add(name); });
  m.def("exchange_quiet", [](bool quiet) { return std::exchange(simulated::quiet, quiet); });
  m.def("exchange_stream_checks", [](bool enabled) { return checker.exchange_enabled(enabled); });
  // A kernel in Python says what it uses by the addresses of storages.
  m.def("launch", [](const std::string& name, int device, const std::vector<uintptr_t>& reads,
                     const std::vector<uintptr_t>& writes) {
    auto pointers = [](const std::vector<uintptr_t>& addresses) {
      simulated::Pointers result;
      for (auto address : addresses) result.push_back(reinterpret_cast<const void*>(address));
      return result;
    };
    counter.add(name);
    checker.launch(name, static_cast<c10::DeviceIndex>(device), pointers(reads), pointers(writes));
  });
  m.def("created", [](const std::string& name, int device, uintptr_t address) {
    checker.created(name, static_cast<c10::DeviceIndex>(device), reinterpret_cast<const void*>(address));
  });
}
