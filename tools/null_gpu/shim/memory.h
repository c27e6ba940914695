// Memory of the null GPU: the host's, each allocation a mapping of its own.
#pragma once
#include <stddef.h>

// OPENED: of another process's device memory. REGISTERED: the host's own, pinned in place.
enum memory_kind { PAGEABLE, PINNED, DEVICE, OPENED, REGISTERED };

enum memory_kind reward_kind(const void *pointer);
void *null_gpu_allocate(size_t size, int kind);         // NULL when the GPU has not so much left
void null_gpu_free(void *start);
void null_gpu_map_ones(void *start, size_t size, int protection);  // NaN in every type of floating point

// For memory that the driver maps where it has reserved addresses (driver.c).
void null_gpu_mapped(void *start, size_t size, int gpu);
void null_gpu_unmapped(void *start);
