"""Why a prediction is what it is: saliency of each branch and of the fusion, its measures, and counterfactuals."""
