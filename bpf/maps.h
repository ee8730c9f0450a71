/* SPDX-License-Identifier: GPL-2.0-only */
/* The maps: what the control plane writes, and what it reads. */
#ifndef MAPS_H
#define MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"

#define MAP(map_type, map_key, map_value, entries, map_name) \
	struct { \
		__uint(type, map_type); \
		__uint(max_entries, entries); \
		__type(key, map_key); \
		__type(value, map_value); \
	} map_name SEC(".maps")

/* A map whose entries take memory only when they are there. */
#define SPARSE_MAP(map_type, map_key, map_value, entries, map_name) \
	struct { \
		__uint(type, map_type); \
		__uint(max_entries, entries); \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
		__type(key, map_key); \
		__type(value, map_value); \
	} map_name SEC(".maps")

SPARSE_MAP(BPF_MAP_TYPE_HASH, __u32, struct nic, MAX_PORTS, ports);
SPARSE_MAP(BPF_MAP_TYPE_HASH, struct where, struct place, MAX_LISTED, list);
SPARSE_MAP(BPF_MAP_TYPE_HASH, struct owner, struct addresses, MAX_LISTED, known);
SPARSE_MAP(BPF_MAP_TYPE_HASH, __u32, struct network, MAX_NETWORKS, networks);
SPARSE_MAP(BPF_MAP_TYPE_HASH, __u32, struct attachment, MAX_LINKS, links);
SPARSE_MAP(BPF_MAP_TYPE_HASH, struct member, __u8, MAX_TRUNKS, trunks);
SPARSE_MAP(BPF_MAP_TYPE_HASH, struct limited, struct bucket, MAX_PORTS * 2, buckets);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct counters, MAX_COUNTED, counters_of);
MAP(BPF_MAP_TYPE_LRU_PERCPU_HASH, struct pair, struct traffic, MAX_PAIRS, pairs);
MAP(BPF_MAP_TYPE_ARRAY, __u32, struct rule, MAX_RULES, rules);
MAP(BPF_MAP_TYPE_LRU_HASH, struct flow, struct flow_state, MAX_FLOWS, flows);
MAP(BPF_MAP_TYPE_PERCPU_ARRAY, __u32, struct verdict, 1, verdicts);

#endif
