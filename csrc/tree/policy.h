// How a search chooses, counts what is in flight, and backs up.
#pragma once

#include <cstdint>

namespace alignops::tree {

enum class Rule : int32_t { kPuct, kPuctRain, kUct, kBoltzmann, kGreedy };
// What Q is put between before PUCT adds its bonus.
enum class Norm : int32_t { kNone, kTree, kSiblings, kFixed };
// The value of an edge without one. kLow: the lower end of the norm.
enum class Fpu : int32_t { kZero, kLow, kParent, kMeanVisited, kInfinite };
enum class Total : int32_t { kParent, kChildren };
// What selections that were not backed up yet add to the lanes.
enum class InFlight : int32_t { kNone, kCount, kVirtualLoss };
enum class Collision : int32_t { kShare, kSkip };

struct Policy {
  Rule rule = Rule::kPuct;
  Norm norm = Norm::kSiblings;
  Fpu fpu = Fpu::kLow;
  Total total = Total::kParent;
  InFlight in_flight = InFlight::kCount;
  Collision collision = Collision::kShare;
  double c = 1.0;            // of RAIN's PUCT and of UCT
  double c1 = 1.25;          // of PUCT
  double c2 = 19652.0;       // of PUCT
  double rate = 1.0;         // inverse temperature of Boltzmann
  double low = 0, high = 1;  // of kFixed
  double floor = 0;          // smallest width of the norm
  double widen = 0;          // added to the width
  bool clip = false;         // normalized Q to [0, 1]
  double loss_weight = 1;    // virtual visits per selection in flight
  double loss = -1;          // what a virtual visit returns
  // Progressive widening, if width > 0: a node whose draws are fewer than ceil(width * N^growth)
  // is a leaf that may grow; N counts visits, those in flight and `first_visits`.
  double width = 0;
  double growth = 0;
  double first_visits = 0;  // that every node counts from its beginning
};

enum class Backing : int32_t { kMean, kMax, kSoft, kSubtreeMean };

struct Backup {
  Backing rule = Backing::kMean;
  double discount = 1.0;
  double rate = 1.0;  // inverse temperature of soft values
};

}  // namespace alignops::tree
