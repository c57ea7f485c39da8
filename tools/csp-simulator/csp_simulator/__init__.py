"""HTTP simulator of Infoblox CSP with faults that can be injected while it runs.

It serves the CSP API under /v2, with the users of each account, and NIOSXaaS under /api/universalinfra. The control
API sets the faults:

  curl localhost:9200/_control
      list every route and every switch, with its meaning and its current value
  curl -X PATCH localhost:9200/_control/behaviour \\
      -d '{"delete_latency_sec": 5, "delete_error_rate": 0.2, "delete_error_status": [500, 503, "hang"]}'
      slow down deletions and fail a fifth of them
  curl -X PATCH localhost:9200/_control/behaviour -d '{"fail_next_listings": 1, "listing_error_html": true}'
      fail one listing with an HTML page
  curl -X PATCH localhost:9200/_control/behaviour -d '{"delete_error_after_effect": true}'
      delete the account although the response is an error
  curl -X PATCH localhost:9200/_control/behaviour -d '{"create_latency_sec": 2, "create_usable_after_sec": 120}'
      answer creations after two seconds, and make the accounts usable two minutes later
  curl -X PATCH localhost:9200/_control/behaviour \\
      -d '{"fail_next_creates": 1, "create_error_status": 504, "create_error_after_effect": true}'
      answer one creation with 504 although the account is created
  curl -X PATCH localhost:9200/_control/behaviour -d '{"create_quota": 60}'
      refuse creations from 60 sandboxes on
  curl -X PATCH localhost:9200/_control/behaviour -d '{"fail_next_deletes": 1, "delete_error_status": "bomb"}'
      answer one deletion with 255 KiB of gzip that decode to 256 MiB
  curl -X PATCH localhost:9200/_control/behaviour -d '{"account_switch_without_effect": true}'
      answer account switches with success, but leave the session in its account
  curl -X PATCH localhost:9200/_control/behaviour -d '{"account_switch_ready_after_sec": 40}'
      refuse switches into each account for the 40 seconds after the first one
  curl -X PATCH localhost:9200/_control/behaviour -d '{"jwt_lifetime_sec": 5, "fail_next_user_passwords": 1}'
      let JWTs expire after five seconds, and fail one change of a password
  curl localhost:9200/_control/users
      list the users inside the accounts
  curl -X POST localhost:9200/_control/accounts/disturb -d '{"drop": 3, "rename": 2, "new_id": 1}'
      remove three random sandboxes, rename two, change the id of one
  curl -X PUT localhost:9200/_control/script -d '{"name": "bad-day", "speed": 100}'
      replay a recorded bad quarter of an hour of CSP in ten seconds
  curl 'localhost:9200/_control/calls?method=DELETE'
      list recorded calls with times and statuses
  curl -X POST localhost:9200/_control/reset -d '{"accounts": 50, "seed": 1}'
      restore the initial state

With a seed, all random choices are repeatable.
"""
