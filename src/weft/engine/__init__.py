"""Online decisions: requests, batches, pages, the loop; one file per policy. No torch."""
