#include "mixed/passes.h"

template struct rnas::cuda::mixed::Passes<rnas::cuda::Half>;
