/// How rows that were received source by source are sorted by expert, and back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkOrder {
    /// The received row that stands in each sorted row, −1 behind the last one.
    pub to_experts: Vec<i32>,
    /// The sorted row that each received row becomes: the inverse.
    pub to_sources: Vec<i32>,
}

impl ChunkOrder {
    /// Sorts chunks of rows from the order (source, expert) to (expert, source). `chunks` are their numbers of rows
    /// in the first order; their sum fits an `i32`. `rows` of them are made, at least as many. `None` if no row changes its
    /// place and none is added.
    ///
    /// ```
    /// use moe_dispatch::plan::ChunkOrder;
    ///
    /// // Two sources; the first sent 1 row for expert 0 and 2 for expert 1, the second 1 and 0.
    /// let order = ChunkOrder::new(&[1, 2, 1, 0], 2, 5).expect("rows move");
    /// assert_eq!(order.to_experts, [0, 3, 1, 2, -1]);
    /// assert_eq!(order.to_sources, [0, 2, 3, 1]);
    /// ```
    pub fn new(chunks: &[usize], experts: usize, rows: usize) -> Option<Self> {
        let starts: Vec<usize> = chunks
            .iter()
            .scan(0, |end, rows| {
                let start = *end;
                *end += rows;
                Some(start)
            })
            .collect();
        let total: usize = chunks.iter().sum();
        let mut to_experts = Vec::with_capacity(rows.max(total));
        for expert in 0..experts {
            for chunk in (expert..chunks.len()).step_by(experts) {
                to_experts.extend((starts[chunk]..starts[chunk] + chunks[chunk]).map(|row| row as i32));
            }
        }
        let in_place = to_experts.iter().enumerate().all(|(sorted, &received)| sorted == received as usize);
        if in_place && rows <= total {
            return None;
        }
        let mut to_sources = vec![0; total];
        for (sorted, &received) in to_experts.iter().enumerate() {
            to_sources[received as usize] = sorted as i32;
        }
        to_experts.resize(rows.max(total), -1);
        Some(ChunkOrder { to_experts, to_sources })
    }
}
