"""An HTTP server that behaves like Infoblox CSP, and misbehaves when told to.

It speaks the CSP API under /v2 and that of NIOSXaaS under /v2/session and /api/universalinfra. What it
does wrong is set while it runs, by the control API:

  curl localhost:9200/_control
      every route and every switch, with its meaning and its value
  curl -X PATCH localhost:9200/_control/behaviour \\
      -d '{"delete_latency_sec": 5, "delete_error_rate": 0.2, "delete_error_status": [500, 503, "hang"]}'
      slow deletions, of which every fifth fails
  curl -X PATCH localhost:9200/_control/behaviour -d '{"fail_next_listings": 1, "listing_error_html": true}'
      one listing fails with an HTML page
  curl -X PATCH localhost:9200/_control/behaviour -d '{"delete_error_after_effect": true}'
      a deletion that fails has happened all the same
  curl -X PATCH localhost:9200/_control/behaviour -d '{"fail_next_deletes": 1, "delete_error_status": "bomb"}'
      one deletion is answered with 255 KiB of gzip for 256 MiB
  curl -X PATCH localhost:9200/_control/behaviour -d '{"account_switch_without_effect": true}'
      a session stays in the account it was in, though the switch seems to work
  curl -X POST localhost:9200/_control/accounts/disturb -d '{"drop": 3, "rename": 2, "new_id": 1}'
      sandboxes disappear, change their names and their ids
  curl -X PUT localhost:9200/_control/script -d '{"name": "bad-day", "speed": 100}'
      a quarter of an hour as CSP once had it, in ten seconds
  curl 'localhost:9200/_control/calls?method=DELETE'
      what it was asked, when, and how it answered
  curl -X POST localhost:9200/_control/reset -d '{"accounts": 50, "seed": 1}'
      all good again

With a seed, chance repeats itself.
"""
