//! Which layers each pipeline stage has, and which rank it lives on.

mod text;

use std::ops::Range;

use moe_pipeline::Placement;

use crate::{Error, Result};

/// Consecutive layers cut into PP·VPP stages; stage `s` is on pipeline rank `s mod PP` unless it is [placed](Self::placed)
/// otherwise, so with several virtual stages a
/// rank has layers from all over the model. The embedding is on the first stage, the head on the last.
///
/// ```
/// use moe_model::PipelineLayout;
///
/// let even = PipelineLayout::even(7, 2, 2)?; // 7 layers, PP2, VPP2
/// assert_eq!((0..4).map(|stage| even.layers(stage)).collect::<Vec<_>>(), [0..1, 1..3, 3..5, 5..7]);
/// assert_eq!(even.stages_of(1).collect::<Vec<_>>(), [1, 3]);
///
/// // Fewer layers beside the embedding and the head.
/// let uneven = PipelineLayout::new(7, 2, &[1, 3, 3, 0])?;
/// assert_eq!(uneven.layers(2), 4..7);
/// # Ok::<(), moe_model::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineLayout {
    placement: Placement,
    /// Where each stage begins, and the number of layers.
    bounds: Vec<usize>,
}

impl PipelineLayout {
    /// Layers `floor(s·L/P) .. floor((s+1)·L/P)` on stage `s` of `P = ranks·virtual_stages`.
    ///
    /// # Errors
    /// No stage, or fewer layers than stages.
    pub fn even(layers: usize, ranks: usize, virtual_stages: usize) -> Result<Self> {
        let stages = ranks * virtual_stages;
        if stages == 0 || layers < stages {
            return Err(Error::FewLayers { layers, stages });
        }
        let bounds = (0..=stages).map(|stage| stage * layers / stages).collect();
        Ok(PipelineLayout { placement: looped(ranks, virtual_stages)?, bounds })
    }

    /// `layers_per_stage[s]` of `layers` layers on stage `s`. The first and the last stage may have none.
    ///
    /// # Errors
    /// A number of stages that is no multiple of the ranks, a stage between others without a layer, or another sum.
    pub fn new(layers: usize, ranks: usize, layers_per_stage: &[usize]) -> Result<Self> {
        let stages = layers_per_stage.len();
        if stages == 0 || ranks == 0 || !stages.is_multiple_of(ranks) {
            return Err(Error::StageCount { stages, ranks });
        }
        if let Some(stage) = (1..stages - 1).find(|&stage| layers_per_stage[stage] == 0) {
            return Err(Error::EmptyStage { stage });
        }
        let mut bounds = vec![0];
        for &layers in layers_per_stage {
            bounds.push(bounds[bounds.len() - 1] + layers);
        }
        match bounds[stages] {
            got if got == layers => Ok(PipelineLayout { placement: looped(ranks, stages / ranks)?, bounds }),
            got => Err(Error::LayerCount { got, layers }),
        }
    }

    /// From Megatron's notation: `Et*3|(tt|)*2t|L` has three layers beside the embedding on the first stage, two stages of
    /// two, one of one, and the head by itself on the last. `E` is the embedding, `t` a layer, `L` the head with the loss, `|`
    /// begins the next stage, `x*n` and `(…)*n` repeat, commas mean nothing.
    ///
    /// ```
    /// use moe_model::PipelineLayout;
    ///
    /// let layout = PipelineLayout::parse(8, 5, "Et*3|(tt|)*2t|L")?;
    /// assert_eq!(layout, PipelineLayout::new(8, 5, &[3, 2, 2, 1, 0])?);
    /// let error = PipelineLayout::parse(8, 2, "Et*4|t*4").unwrap_err().to_string();
    /// assert!(error.ends_with("\n  Et*4|t*4\n          ^"), "{error}");
    /// # Ok::<(), moe_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::LayoutText`] shows what cannot be read; otherwise those of [`new`](Self::new).
    pub fn parse(layers: usize, ranks: usize, text: &str) -> Result<Self> {
        Self::new(layers, ranks, &text::layers_per_stage(text)?)
    }

    /// The same stages on other ranks: where a schedule has them.
    ///
    /// ```
    /// use moe_model::PipelineLayout;
    /// use moe_pipeline::Placement;
    ///
    /// // Down the ranks and back up: the embedding and the head are on the first.
    /// let v_shaped = PipelineLayout::even(8, 2, 2)?.placed(Placement::v_shaped(2)?)?;
    /// assert_eq!(v_shaped.stages_of(0).collect::<Vec<_>>(), [0, 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Other numbers of ranks or stages, or several copies of a stage.
    pub fn placed(self, placement: Placement) -> Result<Self> {
        let sizes = |placement: &Placement| (placement.ranks(), placement.stages(), placement.copies());
        let (expected, got) = (sizes(&self.placement), sizes(&placement));
        match got == expected {
            true => Ok(PipelineLayout { placement, ..self }),
            false => Err(Error::Placement { expected, got }),
        }
    }

    /// Which rank has which stage.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Pipeline ranks, PP.
    pub fn ranks(&self) -> usize {
        self.placement.ranks() as usize
    }

    /// Stages, PP·VPP.
    pub fn stages(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Stages per rank, VPP.
    pub fn virtual_stages(&self) -> usize {
        self.stages() / self.ranks()
    }

    /// The layers of a stage.
    pub fn layers(&self, stage: usize) -> Range<usize> {
        self.bounds[stage]..self.bounds[stage + 1]
    }

    /// All layers.
    pub fn num_layers(&self) -> usize {
        self.bounds[self.stages()]
    }

    /// The stages of a pipeline rank, ascending.
    pub fn stages_of(&self, rank: usize) -> impl Iterator<Item = usize> {
        self.placement.stages_of(rank as u32).iter().map(|&stage| stage as usize)
    }

    /// The pipeline rank of the embedding, and that of the head.
    pub fn ends(&self) -> [usize; 2] {
        [0, self.placement.stages() - 1].map(|stage| self.placement.rank_of(stage).unwrap_or(0) as usize)
    }
}

fn looped(ranks: usize, virtual_stages: usize) -> Result<Placement> {
    let [ranks, virtual_stages] = [ranks, virtual_stages].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    Ok(Placement::looped(ranks, virtual_stages)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_is_on_one_stage_and_every_stage_on_one_rank() {
        for ranks in 1..=5 {
            for virtual_stages in 1..=4 {
                let stages = ranks * virtual_stages;
                for layers in stages..stages + 12 {
                    let layout = PipelineLayout::even(layers, ranks, virtual_stages).unwrap();
                    assert_eq!((layout.stages(), layout.virtual_stages()), (stages, virtual_stages));
                    let all: Vec<usize> = (0..stages).flat_map(|stage| layout.layers(stage)).collect();
                    assert_eq!(all, (0..layers).collect::<Vec<_>>());
                    let sizes = (0..stages).map(|stage| layout.layers(stage).len());
                    assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
                    let mut dealt: Vec<usize> = (0..ranks).flat_map(|rank| layout.stages_of(rank)).collect();
                    dealt.sort_unstable();
                    assert_eq!(dealt, (0..stages).collect::<Vec<_>>());
                    let sizes: Vec<usize> = (0..stages).map(|stage| layout.layers(stage).len()).collect();
                    assert_eq!(PipelineLayout::new(layers, ranks, &sizes).unwrap(), layout);
                }
            }
        }
    }

    #[test]
    fn stages_are_where_they_are_placed() {
        for ranks in 1..=5 {
            let looped = PipelineLayout::even(2 * ranks + 3, ranks, 2).unwrap();
            assert_eq!(looped.ends(), [0, ranks - 1]);
            let placed = looped.clone().placed(Placement::v_shaped(ranks as u32).unwrap()).unwrap();
            assert_eq!(placed.ends(), [0, 0]);
            for rank in 0..ranks {
                assert!(placed.stages_of(rank).eq([rank, 2 * ranks - 1 - rank]));
            }
            assert!((0..2 * ranks).all(|stage| placed.layers(stage) == looped.layers(stage)));
        }
        let refusal = |placement: moe_pipeline::Result<Placement>| {
            let layout = PipelineLayout::even(8, 2, 2).unwrap();
            layout.placed(placement.unwrap()).unwrap_err().to_string()
        };
        assert_eq!(
            refusal(Placement::v_shaped(4)),
            "a layout of 4 stages on 2 ranks cannot be placed as 8 stages on 4 ranks in 1 copies"
        );
        assert_eq!(
            refusal(Placement::bidirectional(2)),
            "a layout of 4 stages on 2 ranks cannot be placed as 4 stages on 2 ranks in 2 copies"
        );
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_values() {
        let refusal =
            |layers, ranks, list: &[usize]| PipelineLayout::new(layers, ranks, list).unwrap_err().to_string();
        assert_eq!(
            refusal(6, 2, &[2, 2, 2]),
            "3 stages cannot be dealt to 2 pipeline ranks: give a multiple of 2"
        );
        assert_eq!(refusal(6, 2, &[]), "0 stages cannot be dealt to 2 pipeline ranks: give a multiple of 2");
        assert_eq!(refusal(6, 2, &[2, 3]), "the stages have 5 layers, but the model has 6");
        assert_eq!(
            refusal(6, 2, &[3, 0, 3, 0]),
            "stage 1 has no layer: only the first stage (with the embedding) and the last (with the head) may have none"
        );
        assert_eq!(
            PipelineLayout::even(3, 2, 2).unwrap_err().to_string(),
            "3 layers are fewer than the 4 stages"
        );
    }
}
