// Streams that are told apart: an operator fails if it uses memory that another stream has used with no event between.
//
// Each stream has a vector clock: for every stream, the last of its operators that is known to come before. An event is a
// copy of a stream's clock, and a stream that waits for the event takes the maximum of both. Each block of memory
// remembers the operator that wrote it last and the operators that have read it since. The host has a clock too. It takes
// the maximum with a stream's clock when it waits for that stream, and every operator starts after what the host knows.
// One clock serves all threads of the host: how threads wait for each other is not seen.
//
// Memory belongs to the stream that was current when it was allocated. Freed, it goes back to that stream at once, as
// with CUDA's allocator: whoever allocates there next may get it while another stream still uses it, unless the owner
// waits for that stream or `record_stream` has told of it. What is still in use is handed on to all that is allocated
// on the owner stream until then, since any of it might be the same block.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Stream.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simulated {

constexpr auto kType = at::DeviceType::PrivateUse1;
constexpr int kDevices = 4;

inline thread_local c10::DeviceIndex current_device = 0;
// As on CUDA, each thread has a current stream for each device. 0 is the device's default stream.
inline thread_local std::array<c10::StreamId, kDevices> current_streams{};

inline c10::Stream stream_of(c10::DeviceIndex device) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, device), current_streams.at(device));
}

using Pointers = std::vector<const void*>;

class Clock {
 public:
  uint64_t at(size_t stream) const { return stream < ticks_.size() ? ticks_[stream] : 0; }

  uint64_t advance(size_t stream) {
    if (ticks_.size() <= stream) ticks_.resize(stream + 1);
    return ++ticks_[stream];
  }

  void join(const Clock& other) {
    if (ticks_.size() < other.ticks_.size()) ticks_.resize(other.ticks_.size());
    for (size_t i = 0; i < other.ticks_.size(); ++i) ticks_[i] = std::max(ticks_[i], other.ticks_[i]);
  }

 private:
  std::vector<uint64_t> ticks_;
};

class StreamChecker {
 public:
  c10::StreamId new_stream() {
    std::lock_guard<std::mutex> lock(mutex_);
    return ++streams_;
  }

  // One operator on the current stream of a device.
  void launch(const std::string& name, c10::DeviceIndex device, const Pointers& reads, const Pointers& writes) {
    if (quiet) return;
    std::lock_guard<std::mutex> lock(mutex_);
    launch_on(stream_of(device), name, reads, writes);
  }

  // As CUDA does: on the source's current stream, after the destination's, which then waits for the copy.
  void copy_between_devices(c10::DeviceIndex from, const void* read, c10::DeviceIndex to, const void* written) {
    if (quiet) return;
    std::lock_guard<std::mutex> lock(mutex_);
    auto source = stream_of(from), destination = stream_of(to);
    clock(source).join(clock(destination));
    launch_on(source, "copy between devices", {read}, {written});
    clock(destination).join(Clock(clock(source)));
  }

  // Results that an operator has just allocated: the operator's stream is the first to use them.
  void created(const std::string& name, c10::DeviceIndex device, const void* data) {
    if (quiet || data == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex_);
    auto stream = stream_of(device);
    if (enabled_) check(stream, clock(stream), name, "writes", data);
    auto number = number_of(stream);
    memory_[data].written(number, clocks_at(number).at(number));
  }

  void allocated(c10::DeviceIndex device, const void* data) {
    if (data == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex_);
    auto stream = stream_of(device);
    const auto& now = clock(stream);
    auto& still_used = still_used_[number_of(stream)];
    still_used.erase(std::remove_if(still_used.begin(), still_used.end(),
                                    [&](const Use& use) { return is_over(use, now); }),
                     still_used.end());
    auto& uses = memory_[data] = Uses();
    uses.owner = number_of(stream);
    uses.of_freed = still_used;
  }

  void freed(const void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = memory_.find(data);
    if (found == memory_.end()) return;
    const auto& uses = found->second;
    auto all = uses.readers;
    if (uses.writer.stream >= 0) all.push_back(uses.writer);
    if (enabled_ && uses.owner >= 0)
      for (const auto& use : all)
        if (use.stream != uses.owner && !uses.recorded.count(use.stream) && !is_over(use, clocks_at(uses.owner)))
          still_used_[uses.owner].push_back(use);
    memory_.erase(found);
  }

  // Keep the memory, when it is freed, until this stream has done what it has been given by then.
  void record(const void* data, const c10::Stream& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = memory_.find(data);
    if (found != memory_.end()) found->second.recorded.insert(number_of(stream));
  }

  Clock recorded(const c10::Stream& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    return clock(stream);
  }

  void wait(const c10::Stream& stream, const Clock& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    clock(stream).join(event);
  }

  void host_waits(const Clock& event) {
    std::lock_guard<std::mutex> lock(mutex_);
    host_.join(event);
  }

  void host_waits_for_stream(const c10::Stream& stream) { host_waits(recorded(stream)); }

  void host_waits_for_device(c10::DeviceIndex device) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t number = 0; number < clocks_.size(); ++number)
      if (number >= devices_.size() || devices_[number] == device) host_.join(clocks_[number]);
  }

  bool exchange_enabled(bool enabled) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(enabled_, enabled);
  }

 private:
  struct Use {
    int stream = -1;
    uint64_t tick = 0;
  };

  struct Uses {  // of a block of memory
    int owner = -1;
    Use writer;
    std::vector<Use> readers;
    std::vector<Use> of_freed;  // of what may be the same block, freed before
    std::set<int> recorded;

    void written(int stream, uint64_t tick) {
      writer = {stream, tick};
      readers.clear();
      of_freed.clear();
    }

    void read(int stream, uint64_t tick) {
      for (auto& reader : readers)
        if (reader.stream == stream) {
          reader.tick = tick;
          return;
        }
      readers.push_back({stream, tick});
    }
  };

  bool is_over(const Use& use, const Clock& now) const {
    return now.at(use.stream) >= use.tick || host_.at(use.stream) >= use.tick;
  }

  // Default streams come first, one per device; ids of other streams differ on all devices.
  static int number_of(const c10::Stream& stream) {
    return stream.id() == 0 ? stream.device_index() : kDevices - 1 + static_cast<int>(stream.id());
  }

  Clock& clocks_at(size_t number) {
    if (clocks_.size() <= number) clocks_.resize(number + 1);
    return clocks_[number];
  }

  Clock& clock(const c10::Stream& stream) {
    size_t number = number_of(stream);
    if (devices_.size() <= number) devices_.resize(number + 1, -1);
    devices_[number] = stream.device_index();
    return clocks_at(number);
  }

  void launch_on(const c10::Stream& stream, const std::string& name, const Pointers& reads, const Pointers& writes) {
    auto number = number_of(stream);
    auto& now = clock(stream);
    now.join(host_);
    if (enabled_) {
      for (auto data : reads) check(stream, now, name, "reads", data);
      for (auto data : writes) check(stream, now, name, "writes", data);
    }
    auto tick = now.advance(number);
    for (auto data : reads)
      if (data != nullptr) memory_[data].read(number, tick);
    for (auto data : writes)
      if (data != nullptr) memory_[data].written(number, tick);
  }

  void check(const c10::Stream& stream, const Clock& now, const std::string& name, const char* does, const void* data) {
    auto found = memory_.find(data);
    if (data == nullptr || found == memory_.end()) return;
    const auto& uses = found->second;
    if (uses.writer.stream >= 0 && !is_over(uses.writer, now)) fail(stream, name, does, "wrote before", uses.writer);
    if (does[0] == 'r') return;
    for (const auto& use : uses.readers)
      if (!is_over(use, now)) fail(stream, name, does, "read before", use);
    for (const auto& use : uses.of_freed)
      if (!is_over(use, now))
        fail(stream, name, does, "may still use, since its memory was freed without record_stream", use);
  }

  void fail(const c10::Stream& stream, const std::string& name, const char* does, const char* did, const Use& other) {
    TORCH_CHECK(false, "expected an event between two streams, got a race: ", name, " on ", described(number_of(stream)),
                " ", does, " a tensor that ", described(other.stream), " ", did,
                "; let the one stream wait for the other");
  }

  std::string described(int number) {
    auto device = number < kDevices ? number : devices_.at(number);
    auto id = number < kDevices ? 0 : number - kDevices + 1;
    return (id ? "stream " + std::to_string(id) : std::string("the default stream")) + " of sim:" + std::to_string(device);
  }

  std::mutex mutex_;
  bool enabled_ = true;
  c10::StreamId streams_ = 0;
  Clock host_;
  std::vector<Clock> clocks_;  // by the stream's number
  std::vector<c10::DeviceIndex> devices_;  // by the stream's number
  std::unordered_map<const void*, Uses> memory_;  // by where a storage begins
  std::unordered_map<int, std::vector<Use>> still_used_;  // what was freed too early, by the owner's number
};

// Never destroyed: threads of the device may end after the interpreter.
inline StreamChecker& checker = *new StreamChecker();

}  // namespace simulated
