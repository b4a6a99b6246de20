from fw_model.generate.pipeline import FantasyWorldPipeline

__all__ = ["FantasyWorldPipeline"]
