// When nobody can see any more what has been replaced. Readers pin the present while they look at
// published objects; what was replaced at a time is free once every pin is younger. Reading takes
// no lock and waits for nobody.
//
// Why it is safe: a reader stores its pin and then loads the published pointer, a writer stores the
// new pointer, advances the time, and later loads the pins, all sequentially consistent. If a
// reader got the old pointer, its pin was stored before the new pointer, so the writer sees it; and
// that pin is not younger than the replacement.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace alignops::attention::store {

class Epochs {
 public:
  using Time = uint64_t;
  static constexpr Time kIdle = UINT64_MAX;

  // The place of one reader, for one use at a time.
  class Pin {
   public:
    explicit Pin(Epochs& epochs) : epochs_(epochs) {
      const std::lock_guard lock(epochs_.mutex_);
      epochs_.pins_.push_back(this);
    }
    ~Pin() {
      const std::lock_guard lock(epochs_.mutex_);
      std::erase(epochs_.pins_, this);
    }
    Pin(const Pin&) = delete;
    Pin& operator=(const Pin&) = delete;

    void hold() { since_.store(epochs_.now_.load()); }
    void drop() { since_.store(kIdle); }

   private:
    friend class Epochs;
    Epochs& epochs_;
    std::atomic<Time> since_{kIdle};
  };

  // Ends the present; what was replaced before belongs to the time returned.
  Time advance() { return now_.fetch_add(1); }
  // What belongs to earlier times than this cannot be seen.
  Time oldest() {
    const std::lock_guard lock(mutex_);
    Time time = now_.load();
    for (const Pin* pin : pins_) time = std::min(time, pin->since_.load());
    return time;
  }

 private:
  std::atomic<Time> now_{0};
  std::mutex mutex_;  // of the list
  std::vector<Pin*> pins_;
};

// Objects that are published, replaced and used again. Called by one writer at a time.
template <class T>
class Recycler {
 public:
  T& fresh() {
    if (free_.empty()) {
      // Room for all to be retired and free at once, so that neither list grows later.
      all_.push_back(std::make_unique<T>());
      free_.reserve(all_.size());
      retired_.reserve(all_.size());
      return *all_.back();
    }
    T* object = free_.back();
    free_.pop_back();
    return *object;
  }
  void retire(T& object, Epochs::Time time) { retired_.emplace_back(time, &object); }
  // clear(object) for each that cannot be seen any more.
  template <class Clear>
  void reclaim(Epochs::Time oldest, const Clear& clear) {
    std::erase_if(retired_, [&](const std::pair<Epochs::Time, T*>& entry) {
      if (entry.first >= oldest) return false;
      clear(*entry.second);
      free_.push_back(entry.second);
      return true;
    });
  }

 private:
  std::vector<std::unique_ptr<T>> all_;
  std::vector<T*> free_;
  std::vector<std::pair<Epochs::Time, T*>> retired_;
};

}  // namespace alignops::attention::store
