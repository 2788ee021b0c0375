// What the device is asked to do, counted by name while somebody counts.
#pragma once

#include <map>
#include <mutex>
#include <string>

namespace simulated {

// Set while an operator runs that stands for one kernel: whatever it calls is neither counted nor checked.
inline thread_local bool quiet = false;

struct Quiet {
  bool before = quiet;
  Quiet() { quiet = true; }
  ~Quiet() { quiet = before; }
};

inline const char* const kRead = "read by the host";
inline const char* const kWait = "wait of the host";

class Counter {
 public:
  void add(const std::string& name) {
    if (quiet) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (counting_) ++counts_[name];
  }

  void start() {
    std::lock_guard<std::mutex> lock(mutex_);
    counting_ = true;
    counts_.clear();
  }

  std::map<std::string, long> stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    counting_ = false;
    return counts_;
  }

 private:
  std::mutex mutex_;
  bool counting_ = false;
  std::map<std::string, long> counts_;
};

inline Counter counter;

}  // namespace simulated
