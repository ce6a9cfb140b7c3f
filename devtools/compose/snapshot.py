"""Take an EBS snapshot of an empty volume at the endpoint of docker-compose.yaml, and print its identifier."""

import sys

import boto3

ec2 = boto3.client(
    "ec2",
    endpoint_url=sys.argv[1],
    region_name="eu-central-1",
    aws_access_key_id="testing",
    aws_secret_access_key="testing",
)
volume = ec2.create_volume(AvailabilityZone="eu-central-1a", Size=1)["VolumeId"]
print(ec2.create_snapshot(VolumeId=volume, Description="taken while frozen")["SnapshotId"])
