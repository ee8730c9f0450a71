// SPDX-License-Identifier: GPL-2.0-only
/* What leads each frame of a link to another one, and no more: the ways from host to host are compared by it. */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#define VNI 77

struct aim {
	__u32 ifindex;
	__u32 host; /* host byte order */
	__u8 mac[6];
	__u16 unused;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct aim);
} aims SEC(".maps");

static struct aim *aim(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&aims, &zero);
}

SEC("tc")
int redirect(__attribute__((unused)) struct __sk_buff *skb)
{
	struct aim *to = aim();

	return to ? bpf_redirect(to->ifindex, 0) : TC_ACT_SHOT;
}

SEC("tc")
int tunnel(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = { .tunnel_id = VNI, .tunnel_ttl = 64 };
	struct aim *to = aim();

	if (!to)
		return TC_ACT_SHOT;
	key.remote_ipv4 = to->host;
	bpf_skb_set_tunnel_key(skb, &key, sizeof(key), BPF_F_ZERO_CSUM_TX);
	return bpf_redirect(to->ifindex, 0);
}

SEC("tc")
int address(struct __sk_buff *skb)
{
	struct ethhdr *eth = (void *)(long)skb->data;
	struct aim *to = aim();

	if (!to || (void *)(eth + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	__builtin_memcpy(eth->h_dest, to->mac, 6);
	return bpf_redirect(to->ifindex, 0);
}

char LICENSE[] SEC("license") = "GPL";
