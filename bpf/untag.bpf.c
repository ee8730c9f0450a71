// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the kernel does with a VLAN tag before any program at ingress sees the frame, and BPF_PROG_TEST_RUN does not:
 * the tag goes from the frame's bytes to where it is kept beside them. Then the program that is to be tried runs.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} tried SEC(".maps");

SEC("tc")
int untag(struct __sk_buff *skb)
{
	__be16 tag;

	if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr), &tag, sizeof(tag)) || bpf_skb_vlan_pop(skb) ||
	    bpf_skb_vlan_push(skb, bpf_htons(ETH_P_8021Q), bpf_ntohs(tag)))
		return TC_ACT_TRAP;
	bpf_tail_call(skb, &tried, 0);
	return TC_ACT_TRAP; /* no program of the switch's gives this */
}

char LICENSE[] SEC("license") = "GPL";
