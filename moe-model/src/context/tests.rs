//! Chunks and blocks against the mask that they stand for.

use moe_kernels::family::{AttentionMask, AttentionShape};

use super::ring::Block;
use super::{positions, zigzag};

fn held(seq_len: usize, ranks: usize, rank: usize) -> Vec<usize> {
    positions(seq_len, ranks, rank).unwrap().collect()
}

#[test]
fn ranks_hold_every_position_once() {
    for cp in 1..7 {
        let seq_len = 2 * cp * 3;
        let mut all: Vec<usize> = (0..cp).flat_map(|rank| held(seq_len, cp, rank)).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..seq_len), "{cp} ranks");
    }
    assert_eq!(held(12, 3, 1), [2, 3, 8, 9]);
    assert!(held(7, 1, 0).into_iter().eq(0..7), "one rank holds any length");
    assert!(positions(14, 2, 0).is_err());
}

/// The ring computes exactly the pairs that a causal mask shows: all of them, each once, and no other is looked at.
#[test]
fn blocks_are_the_causal_mask_and_the_same_work_for_all() {
    for ranks in 1..6 {
        let (len, seq_len) = (6, 6 * ranks);
        let shape = AttentionShape {
            batch: 1,
            q_len: len,
            kv_len: len,
            first_query: 0,
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            v_head_dim: 1,
            scale: 1.0,
            mask: AttentionMask::Causal,
        };
        let mut seen = vec![0; seq_len * seq_len];
        for rank in 0..ranks {
            let mut scores = 0;
            for holder in 0..ranks {
                let Block { queries, keys, mask } = Block::between(rank, holder, &shape);
                assert_eq!(mask == AttentionMask::Causal, rank == holder);
                let (of_rank, of_holder) = (held(seq_len, ranks, rank), held(seq_len, ranks, holder));
                scores += queries.len() * keys.len();
                for i in queries {
                    let keys = keys.clone().filter(|&j| mask == AttentionMask::Full || j <= i);
                    for j in keys {
                        seen[of_rank[i] * seq_len + of_holder[j]] += 1;
                    }
                }
            }
            assert_eq!(scores, len * len + (ranks - 1) * len * len / 2, "rank {rank} of {ranks}");
        }
        for (pair, count) in seen.into_iter().enumerate() {
            assert_eq!(count, usize::from(pair % seq_len <= pair / seq_len), "{ranks} ranks, pair {pair}");
        }
    }
}

/// What an all-to-all group holds together is, sorted, what one rank of the ring of groups holds.
#[test]
fn an_all_to_all_group_is_one_rank_of_the_ring() {
    for (ulysses, ring) in [(2, 1), (2, 3), (3, 2), (4, 4)] {
        let seq_len = 2 * ulysses * ring * 5;
        for group in 0..ring {
            let chunks = |rank: usize| {
                let of_rank = held(seq_len, ulysses * ring, group * ulysses + rank);
                [of_rank[..5].to_vec(), of_rank[5..].to_vec()]
            };
            let mut sorted = vec![Vec::new(); 2 * ulysses];
            for rank in 0..ulysses {
                for (place, chunk) in zigzag(ulysses, rank).into_iter().zip(chunks(rank)) {
                    sorted[place] = chunk;
                }
            }
            assert_eq!(
                sorted.concat(),
                held(seq_len, ring, group),
                "ring {ring} of {ulysses}, group {group}"
            );
        }
    }
}
