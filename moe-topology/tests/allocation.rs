//! Groups of a million ranks cost nothing: no allocation, counted by the allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use moe_topology::{Attention, Axes, Expert, Folding, Mapping, View};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: forwards every call to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

fn visit<V: View>(folding: &Folding, axes: Axes<V>) {
    let rank = black_box(777_777);
    let group = folding.group(rank, axes);
    assert_eq!(group.position(rank), Some(folding.coordinate(rank, axes)));
    assert!(group.iter().take(1000).all(|member| group.contains(member)));
    black_box(folding.groups(axes).take(1000).map(|group| group.len()).sum::<usize>());
    black_box((folding.coordinates::<V>(rank), folding.size(axes), group.key()));
}

#[test]
fn groups_of_a_million_ranks_do_not_allocate() {
    let mapping = Mapping { world_size: 1 << 20, tp: 8, cp: 4, pp: 16, ep: 64, etp: 2, ..Mapping::default() }
        .split(Attention::CP_INNER, 2)
        .optimizer_instances(4);
    let folding = Folding::new(mapping).unwrap();
    assert!(allocations(|| drop(black_box(vec![1u8]))) > 0, "the counter counts");
    let count = allocations(|| {
        for &(_, axes) in Attention::GROUPS {
            visit(&folding, axes);
        }
        for &(_, axes) in Expert::GROUPS {
            visit(&folding, axes);
        }
        visit(&folding, Attention::CP_OUTER | Attention::DP_INNER);
        visit(&folding, Axes::<Expert>::NONE);
        visit(&folding, Expert::ALL);
    });
    assert_eq!(count, 0);
}
