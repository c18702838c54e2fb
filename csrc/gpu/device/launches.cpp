#include "gpu/device/launches.h"

int64_t blockdraft_launches() { return blockdraft::gpu::launched; }
